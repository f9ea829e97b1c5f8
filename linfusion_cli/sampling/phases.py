"""Compute the size, steps, guidance scale and dilation of each phase. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.settings.checks import flag
from linfusion_cli.settings.request import Request

T = TypeVar("T")


@dataclass(frozen=True)
class Phase:
    """The parameters of one resolution. It runs the last `active_steps` of `steps` steps; all if it starts from noise.

    `attention` is "linear" or "original". `dilation` is the rounded ratio to the base size, 1 without dilation.
    """

    index: int
    name: str
    size: Size
    from_noise: bool
    steps: int
    active_steps: int
    guidance_scale: float
    attention: str
    dilation: int


@dataclass(frozen=True)
class PhaseSizes:
    """The `sizes` of all phases, and the sizes they are compared to.

    Phases are named after their ratio to `start`. `base` is the size of the first phase if it starts from noise, else
    the size that the model would start from. `native` is the model's native size.
    """

    sizes: Sequence[Size]
    start: Size
    base: Size
    native: Size
    from_noise: bool


def build_phases(request: Request, phase_sizes: PhaseSizes) -> list[Phase]:
    """Return the phases of an image. Raise UsageError if a setting has more values than there are phases."""
    sizes, from_noise = phase_sizes.sizes, phase_sizes.from_noise
    first = 1 if from_noise else 0
    strengths = [1.0] * first + compute_strengths(request.strength, len(sizes) - first)
    steps, scales = (get_phase_values(request, name, len(sizes)) for name in ("steps", "guidance_scale"))
    attentions = choose_attentions(request, sizes, phase_sizes.native)
    is_dilated = request.upscaler == "demofusion"
    return [
        Phase(
            index=i,
            name="base" if i < first else format_ratio(size.width / phase_sizes.start.width),
            size=size,
            from_noise=i < first,
            steps=steps[i],
            active_steps=count_steps(strengths[i], steps[i]),
            guidance_scale=scales[i],
            attention=attentions[i],
            dilation=compute_dilation(size, phase_sizes.base) if is_dilated and i >= first else 1,
        )
        for i, size in enumerate(sizes)
    ]


def format_ratio(ratio: float) -> str:
    """Format 1.5 as 1.5x and 128.0 as 128x: two digits, or all integer digits if there are more, without exponent."""
    digits = 2 if ratio < 10 else 1 + math.floor(math.log10(ratio))
    return np.format_float_positional(ratio, precision=digits, fractional=False, trim="-") + "x"


def get_phase_values(request: Request, setting: str, phases: int) -> list[Any]:
    """Return the values of `setting` for each phase."""
    return broadcast_values(getattr(request, setting), phases, setting)


def broadcast_values(values: Sequence[T], count: int, setting: str, unit: str = "phase") -> list[T]:
    """Repeat the last of `values` up to `count` values. Raise UsageError if there are more; one value is allowed."""
    if len(values) > count and len(values) > 1:
        reason = (
            f"{flag(setting)} {','.join(map(str, values))} has {len(values)} values; "
            f"the limit is {count} (one per {unit})."
        )
        raise UsageError(reason, "Use fewer values. The last one is repeated.", setting)
    return [*values, *[*values[-1:]] * (count - len(values))][:count]


def compute_strengths(strength: Sequence[float], phases: int) -> list[float]:
    """Return the strength of each phase after the base: `linspace(strength, 0, phases + 1)[:-1]` for a single value."""
    if len(strength) > 1:
        return broadcast_values(strength, phases, "strength")
    return [float(value) for value in np.linspace(strength[0], 0, phases + 1)[:-1]]


def count_steps(strength: float, steps: int) -> int:
    """Return how many of the last steps a phase runs: ceil(steps · strength), computed in float32."""
    return min(steps, math.ceil(np.float32(steps) * np.float32(strength)))


def compute_dilation(size: Size, base: Size) -> int:
    """Return r, the rounded ratio of a phase's side length to that of the base."""
    return max(1, math.floor(math.sqrt(size.area / base.area) + 0.5))


def choose_attentions(request: Request, sizes: Sequence[Size], native: Size) -> list[str]:
    """Return the attention of each phase. `auto` is "original" up to the model's native size, and "linear" above it."""
    kinds = get_phase_values(request, "attention", len(sizes))
    if "linear" in kinds and request.linfusion == "none":
        raise UsageError("--attention linear requires LinFusion weights.", "Remove --linfusion none.", "attention")
    above = "original" if request.linfusion == "none" else "linear"
    automatic = ["original" if size.area <= native.area else above for size in sizes]
    return [auto if kind == "auto" else kind for kind, auto in zip(kinds, automatic, strict=True)]
