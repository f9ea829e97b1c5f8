"""Mountains: ranges of single ones, each with a lit and a dark face and snow on its top."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.demo_model.scenes.noise import blend, field, line, smoothstep
from tools.demo_model.scenes.palette import SNOW, Palette
from tools.demo_model.scenes.sky import Frame
from tools.demo_model.scenes.spec import Spec

Array = np.ndarray


@dataclass(frozen=True)
class Stand:
    """Where a mountain stands, in units; `near` is 1 in front and less where more air is before it."""

    x: float
    foot: float
    height: float
    near: float

    @property
    def summit(self) -> float:
        """How far it is below the top of the picture."""
        return self.foot - self.height


def paint_mountains(
    rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, at: Frame, feet: Sequence[float]
) -> Array:
    """Ranges from far to near, one on each of `feet`; far ones take the colour of the air."""
    wide = at.shape[1] / at.unit
    for i, foot in enumerate(feet):
        places = (np.arange(-0.4, wide + 0.4, 0.42) + rng.uniform(-0.2, 0.2)).tolist()
        rng.shuffle(places)
        for place in places:
            height = rng.uniform(0.2, 0.36)
            stand = Stand(place + rng.uniform(-0.1, 0.1), foot, height, near=(i + 1) / 2)
            image = _mountain(rng, image, spec, colours, at, stand)
    return image


def _mountain(rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, at: Frame, stand: Stand) -> Array:
    below = at.y - _outline(rng, at, stand)
    depth = np.maximum(at.y - stand.summit, 0)
    face = _lit_face(rng, at, stand, depth)
    light = np.clip(0.18 + 0.72 * face + 0.05 * field(rng, at.shape, 3.2, low=6.0), 0, 1)
    albedo = _snow_capped(rng, spec, colours, at, depth - stand.height * 0.42)
    colour = albedo * (colours.shade + light[..., None] * (colours.lit - colours.shade))
    air = 0.8 * colours.low + 0.2 * colours.middle
    haze = np.clip(0.6 * (1 - stand.near) + 0.9 * depth * (1 - 0.5 * stand.near), 0.03, 0.8)
    mask = smoothstep(-0.7 / at.unit, 0.7 / at.unit, below)
    return blend(image, blend(colour, air, np.broadcast_to(haze, at.shape)), mask)


def _outline(rng: np.random.Generator, at: Frame, stand: Stand) -> Array:
    """[1, W]: two slopes, rough at every scale."""
    away = at.x[0] - stand.x
    slope = np.where(away < 0, *rng.uniform(0.85, 1.35, 2))
    rough = line(rng, at.shape[1], at.unit, 2.8, 6.0) * np.clip(np.abs(away) / 0.05, 0.2, 1)
    return (stand.summit + slope * np.abs(away) + 0.009 * rough)[None]


def _lit_face(rng: np.random.Generator, at: Frame, stand: Stand, depth: Array) -> Array:
    """[H, W], 1 towards the light; the edge between the faces winds down from the summit."""
    winding = line(rng, at.shape[0], at.unit, 3.0, 5.0)[:, None] * 0.05 * np.minimum(depth / 0.1, 1)
    across = at.x - stand.x - winding - rng.uniform(-0.35, 0.35) * depth
    return smoothstep(0.008, -0.008, across if at.orb[0] < stand.x else -across)


def _snow_capped(rng: np.random.Generator, spec: Spec, colours: Palette, at: Frame, below_cap: Array) -> Array:
    """The rock's colour, [H, W, 3], and above a ragged line that of snow; beside a lake they are too low for it."""
    cap = smoothstep(0.012, -0.012, below_cap + 0.03 * line(rng, at.shape[1], at.unit, 2.6, 8.0)[None])
    return blend(np.broadcast_to(colours.albedo, (*at.shape, 3)), np.float32(SNOW), cap * (spec.land != "lake"))
