"""From numbers between 0 and 1 to those of a file."""

from __future__ import annotations

import numpy as np


def quantise(rows: np.ndarray, top: int, bits: int, seed: int | None = None) -> np.ndarray:
    """Float rows [n, W, 3] between 0 and 1, the first of them row `top` of the picture -> uint8 or uint16.

    Rounded to the nearest; with `seed`, dithered: a number between two steps becomes the upper one as often as it lies
    near it, so that smooth surfaces have no bands and no tone moves. What lies on a step stays there.
    """
    steps, kind = (255, np.uint8) if bits == 8 else (65535, np.uint16)
    scaled = rows * np.float32(steps)
    if seed is None:
        return np.rint(scaled).astype(kind)
    for row, values in enumerate(scaled, top):
        values += drawn(seed, row, values.shape)
    return np.floor(scaled).clip(0, steps).astype(kind)


def drawn(seed: int, row: int, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers in [0, 1) for a row, the same however a picture is cut into strips."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, row])).random(shape, np.float32)
