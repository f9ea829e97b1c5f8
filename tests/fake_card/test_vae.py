"""Images through SDXL's VAE on a fake card, by every method: memory, copies and work are as planned."""

import pytest

from tests.fake_card.cases import PIXELS, VAE
from tests.fake_card.results import check, check_work, group_of, result
from tests.support.system_packages import needs

pytestmark = needs("g++")


def check_all(case, group) -> None:
    found = result(case.name, group)
    check(case, found)
    for stage in found["stages"]:
        check_work(stage)
    assert found["rows"] == case.size


QUICK, SLOW = [case for case in VAE if case.is_quick], [case for case in VAE if not case.is_quick]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_an_image_is_as_planned(case):
    check_all(case, group_of([*QUICK, PIXELS]))


def test_phases_in_pixel_space_are_as_planned_beside_a_unet_that_waits():
    found = result(PIXELS.name, group_of([*QUICK, PIXELS]))
    check(PIXELS, found)
    assert [stage["name"] for stage in found["stages"] if "plan" in stage] == ["base", "decode", "encode", "2x"]
    for stage in found["stages"]:
        if "plan" in stage:
            check_work(stage)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.name)
def test_other_methods_and_a_large_image_are_as_planned(case):
    check_all(case, group_of(SLOW))
