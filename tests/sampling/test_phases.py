"""The parameters of phases: strengths, steps, names, dilations, and settings with a value per phase."""

from pathlib import Path

import pytest

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.sampling.phases import PhaseSizes, build_phases, compute_dilation, compute_strengths, count_steps
from tests.support.requests import make_request

BASE = Size(1024, 1024)
SIZES = [BASE.times(factor) for factor in (1, 2, 4, 8, 16)]


def phases(sizes=SIZES, from_noise=True, start=BASE, **changed):
    """Build phases of these sizes for a request with the settings `changed`."""
    request = make_request(prompt="a", size=sizes[-1], output=Path("a.tif"), model="demo", **changed)
    return build_phases(request, PhaseSizes(sizes, start, BASE, BASE, from_noise))


def test_strengths_up_to_16k():
    assert compute_strengths([0.32], 4) == pytest.approx([0.32, 0.24, 0.16, 0.08])
    assert compute_strengths([0.32], 0) == []


def test_explicit_strengths_apply_per_phase_and_the_last_is_repeated():
    assert compute_strengths([0.4, 0.2], 4) == [0.4, 0.2, 0.2, 0.2]
    with pytest.raises(UsageError, match=r"--strength 0.4,0.2 has 2 values.* 0 "):
        compute_strengths([0.4, 0.2], 0)


@pytest.mark.parametrize(
    ("strength", "steps", "count"),
    [(0.32, 50, 16), (0.24, 50, 12), (0.08, 50, 4), (0.08, 24, 2), (1, 30, 30), (0, 30, 0)],
)
def test_a_phase_runs_the_last_steps(strength, steps, count):
    assert count_steps(strength, steps) == count


def test_phases_from_noise():
    result = phases(steps=(50,), upscaler="demofusion")
    assert [phase.name for phase in result] == ["base", "2x", "4x", "8x", "16x"]
    assert [phase.active_steps for phase in result] == [50, 16, 12, 8, 4]
    assert [phase.dilation for phase in result] == [1, 2, 4, 8, 16]
    assert [phase.attention for phase in result] == ["original", *["linear"] * 4]
    assert [phase.from_noise for phase in result] == [True, *[False] * 4]


def test_phases_from_an_image_have_no_base():
    result = phases(SIZES[1:], from_noise=False, steps=(50,), upscaler="demofusion")
    assert [phase.name for phase in result] == ["2x", "4x", "8x", "16x"]
    assert [phase.active_steps for phase in result] == [16, 12, 8, 4] and not any(phase.from_noise for phase in result)
    assert [phase.dilation for phase in result] == [2, 4, 8, 16]


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
def test_a_phase_is_named_after_its_ratio_to_the_start(start, width, name):
    (result,) = phases([Size(width, width)], from_noise=False, start=Size(start, start))
    assert result.name == name


def test_sdedit_dilates_nothing():
    assert {phase.dilation for phase in phases(upscaler="sdedit")} == {1}


def test_steps_guidance_and_attention_can_be_set_per_phase():
    result = phases(steps=(50, 30), guidance_scale=(7.5, 5.0, 1.0), attention=("linear", "auto", "original"))
    assert [phase.steps for phase in result] == [50, 30, 30, 30, 30]
    assert [phase.guidance_scale for phase in result] == [7.5, 5.0, 1.0, 1.0, 1.0]
    assert [phase.attention for phase in result] == ["linear", "linear", "original", "original", "original"]
    assert [phase.guidance_scale > 1 for phase in result] == [True, True, False, False, False]


@pytest.mark.parametrize("setting", ["steps", "guidance_scale", "attention"])
def test_more_values_than_phases_are_refused(setting):
    values = ("linear",) * 3 if setting == "attention" else (2,) * 3
    with pytest.raises(UsageError, match=r"has 3 values.* 2 "):
        phases(SIZES[:2], **{setting: values})
    with pytest.raises(UsageError, match=r"--strength 0.3,0.2 has 2 values.* 1 "):
        phases(SIZES[:2], strength=(0.3, 0.2))


@pytest.mark.parametrize(("width", "r"), [(1024, 1), (1280, 1), (1536, 2), (2560, 3), (16384, 16)])
def test_the_dilation_is_the_rounded_ratio_to_the_base(width, r):
    assert compute_dilation(Size(width, width), BASE) == r
