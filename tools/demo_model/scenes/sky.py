"""Paint the sky: gradient, stars, Milky Way, aurora, sun or moon, clouds."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from tools.demo_model.scenes.noise import blend, make_line_noise, make_noise, smoothstep
from tools.demo_model.scenes.palette import Palette
from tools.demo_model.scenes.spec import Spec

Array = np.ndarray
ORB_COLOURS = {
    ("night", "moon"): (0.97, 0.96, 0.88),
    ("night", "crescent"): (0.97, 0.96, 0.88),
    ("dawn", "sun"): (1.0, 0.95, 0.8),
    ("day", "sun"): (1.0, 1.0, 0.92),
    ("sunset", "sun"): (1.0, 0.86, 0.5),
}
AURORAS = {
    "green": ((0.2, 1.0, 0.5), (0.25, 0.4, 0.8)),
    "purple": ((0.5, 0.6, 1.0), (0.8, 0.25, 0.9)),
    "red": ((0.5, 0.9, 0.35), (1.0, 0.2, 0.35)),
}


@dataclass(frozen=True)
class Frame:
    """Composition in units of sqrt(H W) pixels: coordinates, the horizon, and (x, y, radius) of the sun or moon."""

    shape: tuple[int, int]
    unit: float
    x: Array
    y: Array
    horizon: float
    orb: tuple[float, float, float]


def compose_frame(rng: np.random.Generator, spec: Spec, shape: tuple[int, int]) -> Frame:
    """Choose the composition of a scene of [H, W] pixels; the sun or moon stays clear of the land."""
    unit = (shape[0] * shape[1]) ** 0.5
    y, x = (np.arange(n, dtype=np.float32) / unit for n in shape)
    flat = spec.land in ("sea", "plain")
    horizon = float(rng.uniform(0.45, 0.62) if flat else rng.uniform(0.6, 0.72)) * shape[0] / unit
    wide = shape[1] / unit
    low = spec.time in ("sunset", "dawn")
    height = rng.uniform(0.4, 0.8 if flat else 0.5) if low else rng.uniform(0.2, 0.45)
    radius = rng.uniform(0.05, 0.07) if spec.time == "day" else rng.uniform(0.055, 0.09)
    return Frame(
        shape, unit, x[None], y[:, None], horizon, (float(rng.uniform(0.15, 0.85)) * wide, height * horizon, radius)
    )


def paint_sky(rng: np.random.Generator, spec: Spec, colours: Palette, frame: Frame) -> Array:
    """Return the sky as a complete image [H, W, 3], without land."""
    image = _paint_gradient(colours, frame)
    if spec.milky_way:
        image = _paint_milky_way(rng, image, frame)
    if spec.stars:
        image = _paint_stars(rng, image, frame, 2.0 if spec.milky_way else 1.0)
    if spec.aurora:
        image = _paint_aurora(rng, image, frame, spec.aurora)
    if spec.orb:
        image = _paint_orb(rng, image, frame, spec)
    if spec.clouds != "none":
        image = _paint_clouds(rng, image, frame, spec, colours)
    return image


def _paint_gradient(colours: Palette, frame: Frame) -> Array:
    t = np.clip(frame.y[:, 0] / frame.horizon, 0, 1)
    stops = np.stack([colours.top, colours.middle, colours.low])
    rows = np.stack([np.interp(t, (0.0, 0.6, 1.0), stops[:, c]) for c in range(3)], axis=-1)
    return np.broadcast_to(rows[:, None], (*frame.shape, 3)).astype(np.float32)


def _paint_stars(rng: np.random.Generator, image: Array, frame: Frame, density: float) -> Array:
    count = int(rng.uniform(40, 90) * density * (frame.unit / 256) ** 1.2)
    layer = np.zeros(frame.shape, np.float32)
    # stars must not be too fine for the VAE, which downsamples 8 times
    for sigma, share in ((1.2, 0.7), (1.7, 0.3)):
        # stars grow less than the image: larger images have more and relatively finer stars
        sigma *= (frame.unit / 256) ** 0.4
        points = np.zeros(frame.shape, np.float32)
        where = rng.random((2, max(int(count * share), 1)))
        bright = 0.25 + 0.9 * rng.random(where.shape[1]) ** 2.5
        points[(where[0] * frame.shape[0]).astype(int), (where[1] * frame.shape[1]).astype(int)] = bright
        layer += gaussian_filter(points, sigma) * 2 * np.pi * sigma**2
    return image + layer[..., None] * np.float32((0.95, 0.97, 1.0))


def _paint_milky_way(rng: np.random.Generator, image: Array, frame: Frame) -> Array:
    angle = rng.uniform(-0.9, 0.9)
    centre = frame.x.mean() + rng.uniform(-0.2, 0.2)
    away = (frame.x - centre) * np.cos(angle) + (frame.y - 0.4 * frame.horizon) * np.sin(angle)
    band = np.exp(-((away / 0.17) ** 2))
    cloud = np.clip(0.6 + 0.3 * make_noise(rng, frame.shape, 3.4), 0, 1.3)
    dark = np.exp(-(((away + 0.03) / 0.04) ** 2)) * 0.5
    return image + (band * cloud * (1 - dark))[..., None] * np.float32((0.36, 0.32, 0.46))


def _paint_aurora(rng: np.random.Generator, image: Array, frame: Frame, name: str) -> Array:
    foot, crown = (np.float32(c) for c in AURORAS[name])
    for _ in range(int(rng.integers(1, 3))):
        base = (
            frame.horizon * rng.uniform(0.45, 0.9) + 0.06 * make_line_noise(rng, frame.shape[1], frame.unit, 4.2)[None]
        )
        bright = np.clip(0.6 + 0.45 * make_line_noise(rng, frame.shape[1], frame.unit, 3.0, 2.0)[None], 0, 1.5)
        reach = 0.18 + 0.05 * make_line_noise(rng, frame.shape[1], frame.unit, 3.2)[None]
        up = base - frame.y
        light = np.where(up > 0, np.exp(-up / np.clip(reach, 0.06, 0.4)), np.exp(up / 0.02)) * bright
        tone = smoothstep(0.02, 0.3, up)[..., None]
        glow = light[..., None] * (foot * (1 - tone) + crown * tone) * rng.uniform(0.45, 0.8)
        image = 1 - (1 - np.clip(image, 0, 1)) * (1 - np.clip(glow, 0, 1))
    return image


def _paint_orb(rng: np.random.Generator, image: Array, frame: Frame, spec: Spec) -> Array:
    x, y, radius = frame.orb
    away = np.sqrt((frame.x - x) ** 2 + (frame.y - y) ** 2)
    edge = 1.5 / frame.unit
    disc = smoothstep(radius + edge, radius - edge, away)
    colour = np.float32(ORB_COLOURS[spec.time, spec.orb])
    strength = 0.2 if spec.time == "night" else 0.6
    image = image + (np.exp(-away / (1.8 * radius)) * strength)[..., None] * colour * (1.05 - np.clip(image, 0, 1))
    if spec.orb == "crescent":
        side = rng.choice((-0.55, 0.55)) * radius
        disc *= 1 - smoothstep(
            radius + edge, radius - edge, np.sqrt((frame.x - x - side) ** 2 + (frame.y - y + 0.2 * radius) ** 2)
        )
    if spec.orb == "moon":
        colour = colour * np.clip(0.93 + 0.05 * make_noise(rng, frame.shape, 3.6, low=10.0), 0.78, 1.03)[..., None]
    return blend(image, colour, disc)


def _paint_clouds(rng: np.random.Generator, image: Array, frame: Frame, spec: Spec, colours: Palette) -> Array:
    density = make_noise(rng, frame.shape, 4.4, stretch=float(rng.uniform(1.6, 2.4)), low=2.5)
    edge = {"some": 0.6, "many": -0.1, "storm": -1.2}[spec.clouds] + rng.normal(0, 0.12)
    mask = smoothstep(edge, edge + 1.3, density) * 0.92
    if spec.orb:  # clouds are thinner in front of the sun or moon
        x, y, radius = frame.orb
        mask = mask * (1 - 0.9 * np.exp(-((((frame.x - x) ** 2 + (frame.y - y) ** 2) / (1.5 * radius) ** 2) ** 2)))
    # a low sun lights clouds from below, a high one from above
    towards = -1.0 if spec.time in ("sunset", "dawn") else 1.0
    step = max(int(0.03 * frame.unit), 1)
    light = np.clip(0.55 + towards * 1.1 * (density - np.roll(density, step, axis=0)), 0, 1)
    colour = colours.cloud_shade + light[..., None] * (colours.cloud_lit - colours.cloud_shade)
    return blend(image, colour, mask)
