"""A scene from its number: the same number gives the same picture and the same caption."""

from collections.abc import Callable
from functools import partial

import numpy as np

from tools.demo_model.scenes.captions import caption
from tools.demo_model.scenes.ground import paint_ground
from tools.demo_model.scenes.palette import palette
from tools.demo_model.scenes.sky import frame, paint_sky
from tools.demo_model.scenes.spec import Spec, draw_spec

SEED = 20240902


def scene(number: int, shape: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Picture [H, W, 3] uint8 and its caption."""
    _, words, drawn = numbered(number)
    return drawn(shape), words


def numbered(number: int) -> tuple[Spec, str, Callable[[tuple[int, int]], np.ndarray]]:
    """What the scene shows, its caption, and what draws it at a size; before a picture costs anything."""
    rng = np.random.default_rng((SEED, number))
    spec = draw_spec(rng)
    words = caption(spec, rng)
    return spec, words, partial(draw, spec, rng)


def draw(spec: Spec, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """A picture of what `spec` says, [H, W, 3] uint8."""
    colours = palette(spec, rng)
    at = frame(rng, spec, shape)
    image = paint_ground(rng, paint_sky(rng, spec, colours, at), spec, colours, at)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
