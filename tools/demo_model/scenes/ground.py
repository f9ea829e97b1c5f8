"""The land: ridges in layers with haze between them, plains and water in perspective, trees."""

import numpy as np
from scipy.ndimage import gaussian_filter1d

from tools.demo_model.scenes.mountains import paint_mountains
from tools.demo_model.scenes.noise import blend, field, line, smoothstep
from tools.demo_model.scenes.palette import Palette
from tools.demo_model.scenes.sky import Frame
from tools.demo_model.scenes.spec import Spec

Array = np.ndarray


def paint_ground(rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, at: Frame) -> Array:
    """The land laid over a picture of the sky, [H, W, 3]."""
    if spec.land == "sea":
        image = paint_water(rng, image, spec, colours, at)
    elif spec.land == "mountains":
        image = paint_mountains(rng, image, spec, colours, at, [at.horizon + 0.08, at.shape[0] / at.unit + 0.02])
    elif spec.land == "plain":
        image = _plain(rng, image, spec, colours, at)
    elif spec.land == "lake":
        image = paint_mountains(rng, image, spec, colours, at, [at.horizon + 0.005])
        image = paint_water(rng, image, spec, colours, at)
    else:
        image = _layers(rng, image, spec, colours, at, at.shape[0] / at.unit * 0.93, int(rng.integers(3, 6)))
    if spec.mist:
        image = _mist(rng, image, colours, at)
    if spec.trees and spec.land != "forest":
        image = _front_trees(rng, image, colours, at)
    return image


def _layers(
    rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, at: Frame, bottom: float, count: int
) -> Array:
    """Ridges from far to near; far ones take the colour of the air."""
    start = at.horizon - 0.02
    for i in range(count):
        near = i / max(count - 1, 1)
        foot = start + (bottom - start) * near**1.2
        top = _ridge(rng, spec, at, near, foot)
        image = _slope(rng, image, spec, colours, at, top, near)
    return image


def _ridge(rng: np.random.Generator, spec: Spec, at: Frame, near: float, foot: float) -> Array:
    """Height of one skyline, [1, W], in units from the top of the picture."""
    width, unit = at.shape[1], at.unit
    if spec.land in ("hills", "desert"):
        return (foot - 0.03 + 0.045 * line(rng, width, unit, 5.2 if spec.land == "desert" else 4.6))[None]
    hill = foot - 0.02 + 0.04 * line(rng, width, unit, 4.0)
    return (hill - tree_line(rng, width, unit, 0.05 + 0.13 * near, 1.0))[None]


def _slope(
    rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, at: Frame, top: Array, near: float
) -> Array:
    below = at.y - top
    mask = smoothstep(-0.7 / at.unit, 0.7 / at.unit, below)
    albedo = np.broadcast_to(colours.albedo, (*at.shape, 3))
    light = _relief_light(field(rng, at.shape, 4.2, low=3.0), top, at, spec)
    colour = albedo * (colours.shade + light[..., None] * (colours.lit - colours.shade))
    haze = np.clip((1 - near) * 0.62 + 0.05, 0, 0.7) * (0.75 + 0.8 * np.clip(below, 0, 0.3))
    air = 0.8 * colours.low + 0.2 * colours.middle
    return blend(image, blend(colour, air, np.clip(haze, 0, 0.85)), mask)


def _relief_light(relief: Array, top: Array, at: Frame, spec: Spec) -> Array:
    """How much each point faces the sun or moon, 0..1."""
    if spec.land == "forest":
        return np.clip(0.4 - 0.15 * relief, 0, 1)
    side = 1.0 if at.orb[0] < at.x.mean() else -1.0
    step = max(int(0.012 * at.unit), 1)
    slope = relief - np.roll(relief, (step, int(side) * step), axis=(0, 1))
    slope = slope / (slope.std() + 1e-6)
    tilt = np.gradient(gaussian_filter1d(top[0], 0.015 * at.unit))[None] * at.unit * side
    fade = np.exp(-np.maximum(at.y - top, 0) / 0.12)
    # lit from above: every ridge stands out from the foot of the one behind it
    return np.clip(0.3 + 0.5 * fade + 0.08 * slope - 0.4 * np.clip(tilt, -1, 1) * fade, 0, 1)


def tree_line(rng: np.random.Generator, width: int, unit: float, height: float, crowd: float) -> Array:
    """Silhouette of firs, [W], heights in units; `crowd` 1 is a closed wood."""
    line_height = np.zeros(width, np.float32)
    x = np.arange(width, dtype=np.float32) / unit
    for _ in range(int(crowd * width / unit / (0.2 * height))):
        tall = height * rng.uniform(0.45, 1.0)
        away = np.abs(x - rng.uniform(0, width / unit)) / (tall * rng.uniform(0.2, 0.3))
        # boughs: a saw on the outline
        fir = np.clip(1 - away, 0, 1) ** 0.9 * (1 - 0.12 * ((away * 4) % 1))
        np.maximum(line_height, tall * fir, out=line_height)
    return line_height


def _front_trees(rng: np.random.Generator, image: Array, colours: Palette, at: Frame) -> Array:
    bottom = at.shape[0] / at.unit
    hill = bottom - rng.uniform(0.03, 0.08) + 0.02 * line(rng, at.shape[1], at.unit, 4.0)
    firs = tree_line(rng, at.shape[1], at.unit, float(rng.uniform(0.14, 0.3)), float(rng.uniform(0.25, 0.8)))
    below = at.y - (hill - firs)[None]
    mask = smoothstep(-0.7 / at.unit, 0.7 / at.unit, below)
    tone = colours.shade + 0.25 * (colours.lit - colours.shade)
    return blend(image, colours.tree * tone, mask)


def in_perspective(rng: np.random.Generator, at: Frame, beta: float, stretch: float) -> Array:
    """A noise plane seen lying below the horizon, [H, W]; fades out where it would be finer than a pixel."""
    plane = field(rng, at.shape, beta, low=2.0)
    below = np.maximum(at.y - at.horizon, 0.5 / at.unit)
    depth = 0.1 / (below + 0.02)
    row = (depth * stretch * at.unit).astype(int) % at.shape[0]
    column = ((at.x - at.x.mean()) * depth * at.unit).astype(int) % at.shape[1]
    return plane[np.broadcast_to(row, at.shape), np.broadcast_to(column, at.shape)] * smoothstep(0.0, 0.12, below)


def _plain(rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, at: Frame) -> Array:
    below = at.y - at.horizon
    mask = np.broadcast_to(smoothstep(-0.7 / at.unit, 0.7 / at.unit, below), at.shape)
    grass = in_perspective(rng, at, 3.0, 3.0)
    light = np.clip(0.62 + 0.12 * grass, 0, 1.1)
    albedo = colours.albedo * (1 + 0.08 * in_perspective(rng, at, 3.2, 2.0)[..., None] * np.float32((1, -0.3, 0.2)))
    colour = albedo * (colours.shade + light[..., None] * (colours.lit - colours.shade))
    haze = np.broadcast_to(np.clip(0.7 - 2.6 * below, 0.03, 0.7), at.shape)
    image = blend(image, blend(colour, colours.low, haze), mask)
    if rng.random() < 0.5:
        far = (at.horizon + 0.004 - tree_line(rng, at.shape[1], at.unit, 0.03, 1.2))[None]
        wood = smoothstep(0, 1.0 / at.unit, at.y - far) * (at.y < at.horizon + 0.006)
        image = blend(image, 0.5 * colours.tree * colours.lit + 0.35 * colours.low, wood)
    return image


def paint_water(rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, at: Frame) -> Array:
    """Mirrors what is above the horizon in moving water, with a track of light under the sun or moon."""
    below = np.maximum(at.y - at.horizon, 0)
    calm = 0.35 if spec.land == "lake" else 1.0
    waves = in_perspective(rng, at, 2.8, 5.0)
    mirror = at.horizon - below * 0.92 + calm * 0.03 * waves * (0.3 + 3 * below)
    rows = np.clip(mirror * at.unit, 0, at.shape[0] - 1).astype(int)
    reflected = image[rows, np.broadcast_to(np.arange(at.shape[1])[None], at.shape)]
    deep = np.float32((0.08, 0.28, 0.38)) * (colours.shade + 0.5 * (colours.lit - colours.shade))
    share = np.broadcast_to(np.clip(0.28 + 0.9 * below * calm, 0, 0.62), at.shape)
    water = blend(reflected, deep, share) * (1 + 0.08 * calm * waves[..., None])
    if spec.orb:
        water = water + _track(waves, below, at)[..., None] * colours.lit * (0.5 if spec.time == "night" else 0.6)
    mask = np.broadcast_to(smoothstep(-0.7 / at.unit, 0.7 / at.unit, at.y - at.horizon), at.shape)
    return blend(image, water, mask)


def _track(waves: Array, below: Array, at: Frame) -> Array:
    spread = 0.03 + 0.22 * below
    return np.exp(-(((at.x - at.orb[0]) / spread) ** 2)) * (0.4 + 0.6 * smoothstep(-0.6, 1.2, waves))


def _mist(rng: np.random.Generator, image: Array, colours: Palette, at: Frame) -> Array:
    level = at.horizon + rng.uniform(-0.06, 0.08)
    bank = np.exp(-(((at.y - level - 0.03 * field(rng, at.shape, 3.2, 3.0, 2.0)) / rng.uniform(0.06, 0.12)) ** 2))
    return blend(image, 0.85 * colours.low + 0.15 * colours.lit, np.clip(bank * rng.uniform(0.55, 0.85), 0, 1))
