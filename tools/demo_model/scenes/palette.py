"""Colours by time of day, as sRGB in 0..1."""

from dataclasses import dataclass

import numpy as np

from tools.demo_model.scenes.spec import Spec

Array = np.ndarray

# top of the sky, middle, horizon
SKIES = {
    ("night", "blue"): ((0.02, 0.04, 0.12), (0.05, 0.1, 0.25), (0.14, 0.23, 0.42)),
    ("night", "violet"): ((0.05, 0.03, 0.14), (0.12, 0.07, 0.27), (0.28, 0.18, 0.44)),
    ("night", "teal"): ((0.01, 0.06, 0.1), (0.03, 0.14, 0.2), (0.09, 0.3, 0.36)),
    ("dawn", "pink"): ((0.38, 0.45, 0.7), (0.8, 0.6, 0.72), (1.0, 0.78, 0.72)),
    ("dawn", "golden"): ((0.42, 0.56, 0.75), (0.86, 0.77, 0.66), (1.0, 0.88, 0.6)),
    ("dawn", "lavender"): ((0.36, 0.34, 0.6), (0.64, 0.55, 0.78), (0.94, 0.78, 0.84)),
    ("day", "blue"): ((0.12, 0.35, 0.75), (0.33, 0.6, 0.9), (0.74, 0.87, 0.97)),
    ("day", "pale"): ((0.42, 0.6, 0.8), (0.63, 0.77, 0.9), (0.9, 0.94, 0.97)),
    ("day", "turquoise"): ((0.05, 0.45, 0.7), (0.3, 0.7, 0.83), (0.75, 0.93, 0.93)),
    ("sunset", "orange"): ((0.18, 0.2, 0.42), (0.82, 0.42, 0.3), (1.0, 0.7, 0.28)),
    ("sunset", "red"): ((0.2, 0.08, 0.22), (0.7, 0.18, 0.2), (0.98, 0.45, 0.2)),
    ("sunset", "purple"): ((0.16, 0.1, 0.36), (0.52, 0.24, 0.5), (0.98, 0.55, 0.46)),
}
# colour of a white surface in the light and in the shade
LIGHTS = {
    "night": ((0.42, 0.5, 0.7), (0.1, 0.14, 0.26)),
    "dawn": ((1.0, 0.84, 0.8), (0.45, 0.42, 0.58)),
    "day": ((1.0, 0.98, 0.92), (0.42, 0.48, 0.6)),
    "sunset": ((1.0, 0.62, 0.42), (0.28, 0.18, 0.28)),
}
CLOUDS = {
    "night": ((0.34, 0.38, 0.54), (0.1, 0.13, 0.22)),
    "dawn": ((1.0, 0.9, 0.86), (0.66, 0.55, 0.7)),
    "day": ((1.0, 1.0, 1.0), (0.66, 0.72, 0.8)),
    "sunset": ((1.0, 0.66, 0.42), (0.4, 0.22, 0.36)),
}
ALBEDOS = {
    "mountains": (0.5, 0.46, 0.46),
    "hills": (0.36, 0.52, 0.2),
    "lake": (0.48, 0.46, 0.44),
    "plain": (0.5, 0.56, 0.22),
    "desert": (0.93, 0.68, 0.4),
    "forest": (0.16, 0.3, 0.16),
    "sea": (0.1, 0.32, 0.42),
}
SNOW = (0.95, 0.97, 1.0)
TREES = (0.1, 0.19, 0.1)


@dataclass(frozen=True)
class Palette:
    """All colours of one scene, each [3]."""

    top: Array
    middle: Array
    low: Array
    lit: Array
    shade: Array
    cloud_lit: Array
    cloud_shade: Array
    albedo: Array
    tree: Array


def pick_palette(spec: Spec, rng: np.random.Generator) -> Palette:
    """Pick the colours of the scene, each with a small random shift."""
    sky = SKIES[spec.time, spec.tint]
    dim = 0.65 if spec.clouds == "storm" else 0.85 if spec.clouds == "many" else 1.0
    bright = 1.0 if spec.orb or spec.time != "night" else 0.75

    def pick(colour: tuple[float, ...], scale: float = 1.0) -> Array:
        return np.clip(np.float32(colour) * scale + rng.normal(0, 0.02, 3), 0, 1).astype(np.float32)

    # clouds take some of the sky's colour, which keeps a red evening red
    lit, shade = (0.7 * np.float32(c) + 0.3 * np.float32(s) for c, s in zip(CLOUDS[spec.time], sky[::-2], strict=True))
    return Palette(
        *(pick(colour, dim) for colour in sky),
        *(pick(colour, dim * bright) for colour in LIGHTS[spec.time]),
        pick(lit, dim),
        pick(shade, dim),
        pick(SNOW if spec.snow and spec.land != "forest" else ALBEDOS[spec.land]),
        pick(np.float32(TREES) + (0.25 if spec.snow else 0)),
    )
