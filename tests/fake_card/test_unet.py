"""Runs with SDXL's real shapes on a fake card: no blocking copies, no mixed dtypes, and the plan is exact."""

import pytest

from tests.fake_card.cases import LARGEST, PAIRWISE, SINGLE
from tests.fake_card.results import build_group, check_result, check_work, list_steps, run_case
from tests.support.system_packages import needs

FAULT = next(case for case in SINGLE if case.fails)
ALL = [case for case in (*PAIRWISE, *SINGLE) if not case.fails]
QUICK = build_group([FAULT, *(case for case in ALL if case.is_quick)])
SLOW = build_group([case for case in ALL if not case.is_quick])
RUNS = [case if case.is_quick else pytest.param(case, marks=pytest.mark.slow) for case in ALL]


def is_plain(case) -> bool:
    """Return whether a step has one forward pass, or two for guidance."""
    return case.upscaler != "demofusion" and "controlnet" not in case.extras


def get_name(case) -> str:
    return case.name


pytestmark = needs("g++")


def run_in_group(case) -> dict:
    """Run a case with its group, and return its result."""
    return run_case(case.name, QUICK if case.is_quick else SLOW)


def list_phases(result) -> list[dict]:
    """Return the denoising stages."""
    return [stage for stage in result["stages"] if stage.get("plan", {}).get("steps")]


@pytest.mark.parametrize("case", RUNS, ids=get_name)
def test_memory_is_as_planned_and_nobody_waits(case):
    result = run_in_group(case)
    check_result(case, result)
    assert not result["notices"]


@pytest.mark.parametrize("case", RUNS, ids=get_name)
def test_work_is_as_planned(case):
    """A resumed run does a part of the steps. DemoFusion is excluded: its dilated pass ends early."""
    result = run_in_group(case)
    if case.stops_at and case.upscaler == "demofusion":
        return
    for stage in list_phases(result):
        check_work(stage, len(list_steps(stage)[bool(result["resumed"]) :]) / stage["plan"]["steps"])


@pytest.mark.parametrize("case", RUNS, ids=get_name)
def test_a_forward_has_few_kernels(case):
    """One strip has about 5300 kernels; operations over several strips have some for each."""
    if not is_plain(case):
        return
    for stage in list_phases(run_in_group(case)):
        guided = case.guidance_scale[0 if stage["phase_name"] == "base" else -1] > 1
        forwards = 2 if guided and not stage["plan"]["strategy"]["batched"] else 1
        kernel_count = max(after["kernels"] - before["kernels"] for before, after in list_steps(stage)) / forwards
        assert kernel_count <= (9000 if stage["size"] == "4096x4096" else 6000)


@pytest.mark.parametrize("case", RUNS, ids=get_name)
def test_a_stopped_run_is_resumed(case):
    if case.stops_at is None:
        assert run_in_group(case)["resumed"] is None
        return
    assert run_in_group(case)["resumed"] == f"step 1 of {case.steps[-1]} in phase {case.stops_at}"


def test_a_run_continues_with_less_memory_wherever_memory_runs_out():
    """First with sequential guidance, then with smaller strips, then with feature maps on the host."""
    result = run_in_group(FAULT)
    assert result["fails"] == []
    assert len(result["notices"]) == len(FAULT.fails)
    notices = result["notices"]
    assert all(words in notices[0] for words in ("halves of guidance one after the other", "64 rows", "on the device"))
    assert "skip connections on the host" in notices[3] and "maps on the host" in notices[-1]
    assert result["left_pinned"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGEST, ids=get_name)
def test_an_image_of_16384_px_is_as_planned(case):
    result = run_case(case.name, build_group(LARGEST))
    check_result(case, result)
    for stage in list_phases(result):
        check_work(stage)
