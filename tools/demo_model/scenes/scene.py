"""Draw a scene from its number: the number determines the image and the caption."""

from collections.abc import Callable
from functools import partial

import numpy as np

from tools.demo_model.scenes.captions import write_caption
from tools.demo_model.scenes.ground import paint_ground
from tools.demo_model.scenes.palette import pick_palette
from tools.demo_model.scenes.sky import compose_frame, paint_sky
from tools.demo_model.scenes.spec import Spec, draw_spec

SEED = 20240902


def draw_scene(number: int, shape: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Draw scene `number`; return the image [H, W, 3] uint8 and its caption."""
    _, words, draw = prepare_scene(number)
    return draw(shape), words


def prepare_scene(number: int) -> tuple[Spec, str, Callable[[tuple[int, int]], np.ndarray]]:
    """Return the content of scene `number`, its caption and a function that draws it at a given size."""
    rng = np.random.default_rng((SEED, number))
    spec = draw_spec(rng)
    words = write_caption(spec, rng)
    return spec, words, partial(draw_image, spec, rng)


def draw_image(spec: Spec, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Draw the content of `spec`; return the image [H, W, 3] uint8."""
    colours = pick_palette(spec, rng)
    frame = compose_frame(rng, spec, shape)
    image = paint_ground(rng, paint_sky(rng, spec, colours, frame), spec, colours, frame)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
