"""Quantisation of float rows to 8 or 16 bits."""

from __future__ import annotations

import numpy as np


def quantise(rows: np.ndarray, top: int, bits: int, seed: int | None = None) -> np.ndarray:
    """Quantise rows [n, W, 3] in [0, 1], the first of which is row `top` of the image, to uint8 or uint16.

    Without `seed`, round to nearest. With `seed`, dither: round up with a probability equal to the fractional part.
    This avoids banding in smooth areas and keeps the mean; values on a quantisation step are unchanged.
    """
    steps, dtype = (255, np.uint8) if bits == 8 else (65535, np.uint16)
    scaled = rows * np.float32(steps)
    if seed is None:
        return np.rint(scaled).astype(dtype)
    for row, values in enumerate(scaled, top):
        values += draw_dither(seed, row, values.shape)
    return np.floor(scaled).clip(0, steps).astype(dtype)


def draw_dither(seed: int, row: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return uniform noise in [0, 1) for a row of the image; it does not depend on how the image is cut into strips."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, row])).random(shape, np.float32)
