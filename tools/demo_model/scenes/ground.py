"""Paint the land: layers of ridges with haze between them, plains and water in perspective, trees."""

import numpy as np
from scipy.ndimage import gaussian_filter1d

from tools.demo_model.scenes.mountains import paint_mountains
from tools.demo_model.scenes.noise import blend, make_line_noise, make_noise, smoothstep
from tools.demo_model.scenes.palette import Palette
from tools.demo_model.scenes.sky import Frame
from tools.demo_model.scenes.spec import Spec

Array = np.ndarray


def paint_ground(rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, frame: Frame) -> Array:
    """Paint the land over an image of the sky [H, W, 3]; return the result."""
    if spec.land == "sea":
        image = paint_water(rng, image, spec, colours, frame)
    elif spec.land == "mountains":
        image = paint_mountains(
            rng, image, spec, colours, frame, [frame.horizon + 0.08, frame.shape[0] / frame.unit + 0.02]
        )
    elif spec.land == "plain":
        image = _paint_plain(rng, image, spec, colours, frame)
    elif spec.land == "lake":
        image = paint_mountains(rng, image, spec, colours, frame, [frame.horizon + 0.005])
        image = paint_water(rng, image, spec, colours, frame)
    else:
        image = _paint_layers(
            rng, image, spec, colours, frame, frame.shape[0] / frame.unit * 0.93, int(rng.integers(3, 6))
        )
    if spec.mist:
        image = _paint_mist(rng, image, colours, frame)
    if spec.trees and spec.land != "forest":
        image = _paint_front_trees(rng, image, colours, frame)
    return image


def _paint_layers(
    rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, frame: Frame, bottom: float, count: int
) -> Array:
    """Paint ridges from far to near; haze tints the far ones."""
    start = frame.horizon - 0.02
    for i in range(count):
        near = i / max(count - 1, 1)
        foot = start + (bottom - start) * near**1.2
        top = _compute_ridge(rng, spec, frame, near, foot)
        image = _paint_slope(rng, image, spec, colours, frame, top, near)
    return image


def _compute_ridge(rng: np.random.Generator, spec: Spec, frame: Frame, near: float, foot: float) -> Array:
    """Return the height of one skyline [1, W], in units from the top of the image."""
    width, unit = frame.shape[1], frame.unit
    if spec.land in ("hills", "desert"):
        return (foot - 0.03 + 0.045 * make_line_noise(rng, width, unit, 5.2 if spec.land == "desert" else 4.6))[None]
    hill = foot - 0.02 + 0.04 * make_line_noise(rng, width, unit, 4.0)
    return (hill - make_tree_line(rng, width, unit, 0.05 + 0.13 * near, 1.0))[None]


def _paint_slope(
    rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, frame: Frame, top: Array, near: float
) -> Array:
    below = frame.y - top
    mask = smoothstep(-0.7 / frame.unit, 0.7 / frame.unit, below)
    albedo = np.broadcast_to(colours.albedo, (*frame.shape, 3))
    light = _compute_light(make_noise(rng, frame.shape, 4.2, low=3.0), top, frame, spec)
    colour = albedo * (colours.shade + light[..., None] * (colours.lit - colours.shade))
    haze = np.clip((1 - near) * 0.62 + 0.05, 0, 0.7) * (0.75 + 0.8 * np.clip(below, 0, 0.3))
    air = 0.8 * colours.low + 0.2 * colours.middle
    return blend(image, blend(colour, air, np.clip(haze, 0, 0.85)), mask)


def _compute_light(relief: Array, top: Array, frame: Frame, spec: Spec) -> Array:
    """Return the illumination of each point by the sun or moon, 0..1."""
    if spec.land == "forest":
        return np.clip(0.4 - 0.15 * relief, 0, 1)
    side = 1.0 if frame.orb[0] < frame.x.mean() else -1.0
    step = max(int(0.012 * frame.unit), 1)
    slope = relief - np.roll(relief, (step, int(side) * step), axis=(0, 1))
    slope = slope / (slope.std() + 1e-6)
    tilt = np.gradient(gaussian_filter1d(top[0], 0.015 * frame.unit))[None] * frame.unit * side
    fade = np.exp(-np.maximum(frame.y - top, 0) / 0.12)
    # light from above separates each ridge from the foot of the one behind it
    return np.clip(0.3 + 0.5 * fade + 0.08 * slope - 0.4 * np.clip(tilt, -1, 1) * fade, 0, 1)


def make_tree_line(rng: np.random.Generator, width: int, unit: float, height: float, crowd: float) -> Array:
    """Return the silhouette of firs [W], heights in units; `crowd` 1 is a closed forest."""
    line_height = np.zeros(width, np.float32)
    x = np.arange(width, dtype=np.float32) / unit
    for _ in range(int(crowd * width / unit / (0.2 * height))):
        tall = height * rng.uniform(0.45, 1.0)
        away = np.abs(x - rng.uniform(0, width / unit)) / (tall * rng.uniform(0.2, 0.3))
        # branches: a sawtooth along the outline
        fir = np.clip(1 - away, 0, 1) ** 0.9 * (1 - 0.12 * ((away * 4) % 1))
        np.maximum(line_height, tall * fir, out=line_height)
    return line_height


def _paint_front_trees(rng: np.random.Generator, image: Array, colours: Palette, frame: Frame) -> Array:
    bottom = frame.shape[0] / frame.unit
    hill = bottom - rng.uniform(0.03, 0.08) + 0.02 * make_line_noise(rng, frame.shape[1], frame.unit, 4.0)
    firs = make_tree_line(rng, frame.shape[1], frame.unit, float(rng.uniform(0.14, 0.3)), float(rng.uniform(0.25, 0.8)))
    below = frame.y - (hill - firs)[None]
    mask = smoothstep(-0.7 / frame.unit, 0.7 / frame.unit, below)
    tone = colours.shade + 0.25 * (colours.lit - colours.shade)
    return blend(image, colours.tree * tone, mask)


def make_perspective_noise(rng: np.random.Generator, frame: Frame, beta: float, stretch: float) -> Array:
    """Return noise [H, W] on a plane in perspective below the horizon; it fades where it would alias."""
    plane = make_noise(rng, frame.shape, beta, low=2.0)
    below = np.maximum(frame.y - frame.horizon, 0.5 / frame.unit)
    depth = 0.1 / (below + 0.02)
    row = (depth * stretch * frame.unit).astype(int) % frame.shape[0]
    column = ((frame.x - frame.x.mean()) * depth * frame.unit).astype(int) % frame.shape[1]
    return plane[np.broadcast_to(row, frame.shape), np.broadcast_to(column, frame.shape)] * smoothstep(0.0, 0.12, below)


def _paint_plain(rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, frame: Frame) -> Array:
    below = frame.y - frame.horizon
    mask = np.broadcast_to(smoothstep(-0.7 / frame.unit, 0.7 / frame.unit, below), frame.shape)
    grass = make_perspective_noise(rng, frame, 3.0, 3.0)
    light = np.clip(0.62 + 0.12 * grass, 0, 1.1)
    albedo = colours.albedo * (
        1 + 0.08 * make_perspective_noise(rng, frame, 3.2, 2.0)[..., None] * np.float32((1, -0.3, 0.2))
    )
    colour = albedo * (colours.shade + light[..., None] * (colours.lit - colours.shade))
    haze = np.broadcast_to(np.clip(0.7 - 2.6 * below, 0.03, 0.7), frame.shape)
    image = blend(image, blend(colour, colours.low, haze), mask)
    if rng.random() < 0.5:
        far = (frame.horizon + 0.004 - make_tree_line(rng, frame.shape[1], frame.unit, 0.03, 1.2))[None]
        wood = smoothstep(0, 1.0 / frame.unit, frame.y - far) * (frame.y < frame.horizon + 0.006)
        image = blend(image, 0.5 * colours.tree * colours.lit + 0.35 * colours.low, wood)
    return image


def paint_water(rng: np.random.Generator, image: Array, spec: Spec, colours: Palette, frame: Frame) -> Array:
    """Reflect the image above the horizon in waves, with a light track below the sun or moon."""
    below = np.maximum(frame.y - frame.horizon, 0)
    calm = 0.35 if spec.land == "lake" else 1.0
    waves = make_perspective_noise(rng, frame, 2.8, 5.0)
    mirror = frame.horizon - below * 0.92 + calm * 0.03 * waves * (0.3 + 3 * below)
    rows = np.clip(mirror * frame.unit, 0, frame.shape[0] - 1).astype(int)
    reflected = image[rows, np.broadcast_to(np.arange(frame.shape[1])[None], frame.shape)]
    deep = np.float32((0.08, 0.28, 0.38)) * (colours.shade + 0.5 * (colours.lit - colours.shade))
    share = np.broadcast_to(np.clip(0.28 + 0.9 * below * calm, 0, 0.62), frame.shape)
    water = blend(reflected, deep, share) * (1 + 0.08 * calm * waves[..., None])
    if spec.orb:
        water = water + _compute_light_track(waves, below, frame)[..., None] * colours.lit * (
            0.5 if spec.time == "night" else 0.6
        )
    mask = np.broadcast_to(smoothstep(-0.7 / frame.unit, 0.7 / frame.unit, frame.y - frame.horizon), frame.shape)
    return blend(image, water, mask)


def _compute_light_track(waves: Array, below: Array, frame: Frame) -> Array:
    spread = 0.03 + 0.22 * below
    return np.exp(-(((frame.x - frame.orb[0]) / spread) ** 2)) * (0.4 + 0.6 * smoothstep(-0.6, 1.2, waves))


def _paint_mist(rng: np.random.Generator, image: Array, colours: Palette, frame: Frame) -> Array:
    level = frame.horizon + rng.uniform(-0.06, 0.08)
    bank = np.exp(
        -(((frame.y - level - 0.03 * make_noise(rng, frame.shape, 3.2, 3.0, 2.0)) / rng.uniform(0.06, 0.12)) ** 2)
    )
    return blend(image, 0.85 * colours.low + 0.15 * colours.lit, np.clip(bank * rng.uniform(0.55, 0.85), 0, 1))
