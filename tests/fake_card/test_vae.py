"""SDXL's VAE on a fake card with every strategy: memory, copies and work are as planned."""

import pytest

from tests.fake_card.cases import PIXELS, VAE
from tests.fake_card.results import build_group, check_result, check_work, run_case
from tests.support.system_packages import needs

pytestmark = needs("g++")


def check_all(case, group) -> None:
    result = run_case(case.name, group)
    check_result(case, result)
    for stage in result["stages"]:
        check_work(stage)
    assert result["rows"] == case.size


QUICK, SLOW = [case for case in VAE if case.is_quick], [case for case in VAE if not case.is_quick]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_an_image_is_as_planned(case):
    check_all(case, build_group([*QUICK, PIXELS]))


def test_phases_in_pixel_space_are_as_planned():
    result = run_case(PIXELS.name, build_group([*QUICK, PIXELS]))
    check_result(PIXELS, result)
    assert [stage["kind"] for stage in result["stages"] if "plan" in stage] == ["denoise", "decode", "start", "denoise"]
    for stage in result["stages"]:
        if "plan" in stage:
            check_work(stage)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.name)
def test_other_strategies_and_a_large_image_are_as_planned(case):
    check_all(case, build_group(SLOW))
