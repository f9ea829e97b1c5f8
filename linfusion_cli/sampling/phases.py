"""What each phase of a picture runs, in numbers: its size, steps, guidance and dilation. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.settings.request import ImageRequest, flag

T = TypeVar("T")


@dataclass(frozen=True)
class Phase:
    """One resolution: `count` of the last of `steps` steps run, all where it begins with noise.

    `attention` is linear or original. `dilation` is how much larger than the base it is, 1 where nothing is dilated.
    """

    index: int
    name: str
    size: Size
    from_noise: bool
    steps: int
    count: int
    guidance_scale: float
    attention: str
    dilation: int


@dataclass(frozen=True)
class PhaseSizes:
    """The sizes of a ladder: of its phases, of the `start` that they are named after, and of the base.

    It starts with noise, at the base, or with a picture, and then `base` is the size that the model is `native` in.
    """

    sizes: Sequence[Size]
    start: Size
    base: Size
    native: Size
    from_noise: bool


def build_phases(request: ImageRequest, rungs: PhaseSizes) -> list[Phase]:
    """The phases of a picture; raises UsageError where a setting names more of them than there are."""
    sizes, from_noise = rungs.sizes, rungs.from_noise
    first = 1 if from_noise else 0
    strengths = [1.0] * first + phase_strengths(request.strength, len(sizes) - first)
    steps, scales = (each_phase(request, name, len(sizes)) for name in ("steps", "guidance_scale"))
    kinds = attentions(request, sizes, rungs.native)
    return [
        Phase(
            index=i,
            name="base" if i < first else format_ratio(size.width / rungs.start.width),
            size=size,
            from_noise=i < first,
            steps=steps[i],
            count=steps_run(strengths[i], steps[i]),
            guidance_scale=scales[i],
            attention=kinds[i],
            dilation=1 if i < first or request.upscaler != "demofusion" else dilation(size, rungs.base),
        )
        for i, size in enumerate(sizes)
    ]


def format_ratio(ratio: float) -> str:
    """1.5 -> 1.5x, 128.0 -> 128x: two digits, or all before the point, and never an exponent."""
    digits = 2 if ratio < 10 else 1 + math.floor(math.log10(ratio))
    return np.format_float_positional(ratio, precision=digits, fractional=False, trim="-") + "x"


def each_phase(request: ImageRequest, setting: str, phases: int) -> list:
    """The values of `setting`, one a phase: the last holds for all that follow."""
    return broadcast_per_phase(getattr(request, setting), phases, setting)


def broadcast_per_phase(values: Sequence[T], phases: int, setting: str) -> list[T]:
    """`values`, the last as often as it takes; raises UsageError where there are more than phases, or adapters."""
    if len(values) > phases and len(values) > 1:
        reason = (
            f"{flag(setting)} {','.join(map(str, values))} names {len(values)} phases, {len(values) - phases} too many."
        )
        raise UsageError(reason, "Name as many or fewer; the last holds for all that follow.", setting)
    return [*values, *values[-1:] * (phases - len(values))][:phases]


def phase_strengths(strength: Sequence[float], phases: int) -> list[float]:
    """The strength of each phase above the base: of one value, `linspace(strength, 0, phases + 1)` without its last."""
    if len(strength) > 1:
        return broadcast_per_phase(strength, phases, "strength")
    return [float(value) for value in np.linspace(strength[0], 0, phases + 1)[:-1]]


def steps_run(strength: float, steps: int) -> int:
    """How many of the schedule's last steps a phase runs: ceil(steps · strength), the strength in float32."""
    return min(steps, math.ceil(np.float32(steps) * np.float32(strength)))


def dilation(size: Size, base: Size) -> int:
    """r: how much larger than the base a phase is, rounded."""
    return max(1, math.floor(math.sqrt(size.area / base.area) + 0.5))


def attentions(request: ImageRequest, sizes: Sequence[Size], native: Size) -> list[str]:
    """The attention of each phase: `auto` is the model's own up to its native size, as trained, then linear."""
    kinds = each_phase(request, "attention", len(sizes))
    if "linear" in kinds and request.linfusion == "none":
        raise UsageError("--attention linear needs LinFusion's weights.", "Leave --linfusion none out.", "attention")
    above = "original" if request.linfusion == "none" else "linear"
    automatic = ["original" if size.area <= native.area else above for size in sizes]
    return [auto if kind == "auto" else kind for kind, auto in zip(kinds, automatic, strict=True)]
