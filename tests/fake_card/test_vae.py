"""Images through SDXL's VAE on a fake card, by every method: memory, copies and work are as planned."""

import pytest

from tests.fake_card.cases import LARGEST_VAE, VAE
from tests.fake_card.results import check, check_work, group_of, result
from tests.system_packages import needs

pytestmark = needs("g++")


def check_all(case, group) -> None:
    found = result(case.name, group)
    check(case, found)
    for stage in found["stages"]:
        check_work(stage)
    assert found["rows"] == case.size


@pytest.mark.parametrize("case", VAE, ids=lambda case: case.name)
def test_an_image_is_as_planned(case):
    check_all(case, group_of(VAE))


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGEST_VAE, ids=lambda case: case.name)
def test_a_large_image_is_as_planned(case):
    check_all(case, group_of(LARGEST_VAE))
