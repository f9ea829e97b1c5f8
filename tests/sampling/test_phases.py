from pathlib import Path

import pytest

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.sampling.phases import PhaseSizes, build_phases, dilation, phase_strengths, steps_run
from linfusion_cli.settings.request import GenerateRequest

BASE = Size(1024, 1024)
SIZES = [BASE.times(factor) for factor in (1, 2, 4, 8, 16)]


def phases(sizes=SIZES, from_noise=True, start=BASE, **changed):
    request = GenerateRequest(prompt="a", size=sizes[-1], output=Path("a.tif"), model="demo", **changed)
    return build_phases(request, PhaseSizes(sizes, start, BASE, BASE, from_noise))


def test_strengths_of_a_16k_ladder():
    assert phase_strengths([0.32], 4) == pytest.approx([0.32, 0.24, 0.16, 0.08])
    assert phase_strengths([0.32], 0) == []


def test_strengths_by_name_hold_for_their_phases_and_the_last_for_all_that_follow():
    assert phase_strengths([0.4, 0.2], 4) == [0.4, 0.2, 0.2, 0.2]
    with pytest.raises(UsageError, match="--strength 0.4,0.2 names 2 phases, 2 too many"):
        phase_strengths([0.4, 0.2], 0)


@pytest.mark.parametrize(
    ("strength", "steps", "count"),
    [(0.32, 50, 16), (0.24, 50, 12), (0.08, 50, 4), (0.08, 24, 2), (1, 30, 30), (0, 30, 0)],
)
def test_a_phase_runs_the_last_steps(strength, steps, count):
    assert steps_run(strength, steps) == count


def test_a_ladder_from_noise():
    found = phases(steps=(50,), upscaler="demofusion")
    assert [phase.name for phase in found] == ["base", "2x", "4x", "8x", "16x"]
    assert [phase.count for phase in found] == [50, 16, 12, 8, 4]
    assert [phase.dilation for phase in found] == [1, 2, 4, 8, 16]
    assert [phase.attention for phase in found] == ["original", *["linear"] * 4]
    assert [phase.from_noise for phase in found] == [True, *[False] * 4]


def test_a_ladder_from_a_image_has_no_base():
    found = phases(SIZES[1:], from_noise=False, steps=(50,), upscaler="demofusion")
    assert [phase.name for phase in found] == ["2x", "4x", "8x", "16x"]
    assert [phase.count for phase in found] == [16, 12, 8, 4] and not any(phase.from_noise for phase in found)
    assert [phase.dilation for phase in found] == [2, 4, 8, 16]


@pytest.mark.parametrize(
    ("start", "width", "name"),
    [
        (1024, 1536, "1.5x"),
        (1024, 1500, "1.5x"),
        (1024, 2048, "2x"),
        (1024, 10200, "10x"),
        (1024, 12288, "12x"),
        (100, 9960, "100x"),
        (1024, 102400, "100x"),
        (128, 16384, "128x"),
        (64, 100_032, "1563x"),
        (1_000_000, 64, "0.000064x"),
    ],
)
def test_a_phase_is_named_after_how_much_larger_it_is_than_the_start(start, width, name):
    (found,) = phases([Size(width, width)], from_noise=False, start=Size(start, start))
    assert found.name == name


def test_sdedit_dilates_nothing():
    assert {phase.dilation for phase in phases(upscaler="sdedit")} == {1}


def test_every_phase_can_have_its_own_steps_guidance_and_attention():
    found = phases(steps=(50, 30), guidance_scale=(7.5, 5.0, 1.0), attention=("linear", "auto", "original"))
    assert [phase.steps for phase in found] == [50, 30, 30, 30, 30]
    assert [phase.guidance_scale for phase in found] == [7.5, 5.0, 1.0, 1.0, 1.0]
    assert [phase.attention for phase in found] == ["linear", "linear", "original", "original", "original"]
    assert [phase.guidance_scale > 1 for phase in found] == [True, True, False, False, False]


@pytest.mark.parametrize("setting", ["steps", "guidance_scale", "attention"])
def test_more_values_than_phases_are_refused(setting):
    values = ("linear",) * 3 if setting == "attention" else (2,) * 3
    with pytest.raises(UsageError, match="names 3 phases, 1 too many"):
        phases(SIZES[:2], **{setting: values})
    with pytest.raises(UsageError, match="--strength 0.3,0.2 names 2 phases, 1 too many"):
        phases(SIZES[:2], strength=(0.3, 0.2))


@pytest.mark.parametrize(("width", "r"), [(1024, 1), (1280, 1), (1536, 2), (2560, 3), (16384, 16)])
def test_the_dilation_is_how_much_larger_than_the_base_a_phase_is(width, r):
    assert dilation(Size(width, width), BASE) == r
