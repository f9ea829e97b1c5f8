"""Paint mountain ranges: each peak has a lit face, a dark face and a snow cap."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.demo_model.scenes.noise import blend, make_line_noise, make_noise, smoothstep
from tools.demo_model.scenes.palette import SNOW, Palette
from tools.demo_model.scenes.sky import Frame
from tools.demo_model.scenes.spec import Spec

Array = np.ndarray


@dataclass(frozen=True)
class Peak:
    """Position and size of a mountain, in units; `near` is 1 in the foreground and smaller further away."""

    x: float
    foot: float
    height: float
    near: float

    @property
    def summit(self) -> float:
        """Distance of the summit from the top of the image."""
        return self.foot - self.height


def paint_mountains(
    rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, frame: Frame, feet: Sequence[float]
) -> Array:
    """Paint ranges from far to near, one with its foot at each of `feet`; haze tints the far ones."""
    wide = frame.shape[1] / frame.unit
    for i, foot in enumerate(feet):
        positions = (np.arange(-0.4, wide + 0.4, 0.42) + rng.uniform(-0.2, 0.2)).tolist()
        rng.shuffle(positions)
        for position in positions:
            height = rng.uniform(0.2, 0.36)
            peak = Peak(position + rng.uniform(-0.1, 0.1), foot, height, near=(i + 1) / 2)
            image = _paint_mountain(rng, image, spec, colours, frame, peak)
    return image


def _paint_mountain(
    rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, frame: Frame, peak: Peak
) -> Array:
    below = frame.y - _compute_outline(rng, frame, peak)
    depth = np.maximum(frame.y - peak.summit, 0)
    face = _compute_lighting(rng, frame, peak, depth)
    light = np.clip(0.18 + 0.72 * face + 0.05 * make_noise(rng, frame.shape, 3.2, low=6.0), 0, 1)
    albedo = _compute_albedo(rng, spec, colours, frame, depth - peak.height * 0.42)
    colour = albedo * (colours.shade + light[..., None] * (colours.lit - colours.shade))
    air = 0.8 * colours.low + 0.2 * colours.middle
    haze = np.clip(0.6 * (1 - peak.near) + 0.9 * depth * (1 - 0.5 * peak.near), 0.03, 0.8)
    mask = smoothstep(-0.7 / frame.unit, 0.7 / frame.unit, below)
    return blend(image, blend(colour, air, np.broadcast_to(haze, frame.shape)), mask)


def _compute_outline(rng: np.random.Generator, frame: Frame, peak: Peak) -> Array:
    """Return the outline [1, W]: two slopes with fractal roughness."""
    away = frame.x[0] - peak.x
    slope = np.where(away < 0, *rng.uniform(0.85, 1.35, 2))
    rough = make_line_noise(rng, frame.shape[1], frame.unit, 2.8, 6.0) * np.clip(np.abs(away) / 0.05, 0.2, 1)
    return (peak.summit + slope * np.abs(away) + 0.009 * rough)[None]


def _compute_lighting(rng: np.random.Generator, frame: Frame, peak: Peak, depth: Array) -> Array:
    """Return the lighting [H, W], 1 on the lit face; the edge between the faces winds down from the summit."""
    winding = make_line_noise(rng, frame.shape[0], frame.unit, 3.0, 5.0)[:, None] * 0.05 * np.minimum(depth / 0.1, 1)
    across = frame.x - peak.x - winding - rng.uniform(-0.35, 0.35) * depth
    return smoothstep(0.008, -0.008, across if frame.orb[0] < peak.x else -across)


def _compute_albedo(rng: np.random.Generator, spec: Spec, colours: Palette, frame: Frame, below_cap: Array) -> Array:
    """Return the albedo [H, W, 3]: rock, and snow above a ragged line, except at a lake, where mountains are low."""
    cap = smoothstep(0.012, -0.012, below_cap + 0.03 * make_line_noise(rng, frame.shape[1], frame.unit, 2.6, 8.0)[None])
    return blend(np.broadcast_to(colours.albedo, (*frame.shape, 3)), np.float32(SNOW), cap * (spec.land != "lake"))
