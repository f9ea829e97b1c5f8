"""Whole runs at SDXL's real shape on a fake card: nothing waits, nothing is mixed, and the plan is what happens."""

import pytest

from tests.fake_card.cases import LARGEST, PAIRWISE, SINGLE
from tests.fake_card.results import check, check_work, group_of, result, steps_of
from tests.support.system_packages import needs

FAULT = next(case for case in SINGLE if case.fails)
ALL = [case for case in (*PAIRWISE, *SINGLE) if not case.fails]
QUICK = group_of([FAULT, *(case for case in ALL if case.is_quick)])
SLOW = group_of([case for case in ALL if not case.is_quick])
RUNS = [case if case.is_quick else pytest.param(case, marks=pytest.mark.slow) for case in ALL]


def is_plain(case) -> bool:
    """Whether a step has one forward, or two halves."""
    return case.upscaler != "demofusion" and "controlnet" not in case.extras


def named(case) -> str:
    return case.name


pytestmark = needs("g++")


def found_in(case) -> dict:
    return result(case.name, QUICK if case.is_quick else SLOW)


def phases(found) -> list[dict]:
    """The stages that denoise."""
    return [stage for stage in found["stages"] if stage.get("plan", {}).get("steps")]


@pytest.mark.parametrize("case", RUNS, ids=named)
def test_memory_is_as_planned_and_nobody_waits(case):
    found = found_in(case)
    check(case, found)
    assert not found["notices"]


@pytest.mark.parametrize("case", RUNS, ids=named)
def test_work_is_as_planned(case):
    """Of a run that goes on, its part of the steps; those of DemoFusion differ, as the dilated pass ends early."""
    found = found_in(case)
    if case.stops_at and case.upscaler == "demofusion":
        return
    for stage in phases(found):
        check_work(stage, len(steps_of(stage)[bool(found["resumed"]) :]) / stage["plan"]["steps"])


@pytest.mark.parametrize("case", RUNS, ids=named)
def test_a_forward_has_few_kernels(case):
    """One strip has about 5300; a pass over a map of several has some for each."""
    if not is_plain(case):
        return
    for stage in phases(found_in(case)):
        guided = case.guidance_scale[0 if stage["name"] == "base" else -1] > 1
        forwards = 2 if guided and not stage["plan"]["mode"]["together"] else 1
        most = max(after["kernels"] - before["kernels"] for before, after in steps_of(stage)) / forwards
        assert most <= (9000 if stage["size"] == "4096x4096" else 6000)


@pytest.mark.parametrize("case", RUNS, ids=named)
def test_a_run_that_was_stopped_goes_on(case):
    if case.stops_at is None:
        assert found_in(case)["resumed"] is None
        return
    assert found_in(case)["resumed"] == f"step 1 of {case.steps[-1]} in phase {case.stops_at}"


def test_wherever_memory_runs_out_the_run_goes_on_with_less():
    """In each kind of operation: halves one after the other at first, then lower strips, then maps on the host."""
    found = found_in(FAULT)
    assert found["fails"] == []
    assert len(found["notices"]) == len(FAULT.fails)
    assert "both halves of guidance one after the other" in found["notices"][0]
    assert "64 rows" in found["notices"][0] and "maps on the device" in found["notices"][0]
    assert "skip connections on the host" in found["notices"][3]
    assert "maps on the host" in found["notices"][-1]
    assert found["left_pinned"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGEST, ids=named)
def test_an_image_of_16384_px_is_as_planned(case):
    found = result(case.name, group_of(LARGEST))
    check(case, found)
    for stage in phases(found):
        check_work(stage)
