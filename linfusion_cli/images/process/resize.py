"""Lanczos resizing of a picture that is read and made region by region."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

LANCZOS_SUPPORT = 3

Region = tuple[int, int, int, int]  # top, bottom, left, right
ReadRegion = Callable[[int, int, int, int], np.ndarray]  # -> float32 [bottom - top, right - left, 3]


def resize_region(read: ReadRegion, source: tuple[int, int], target: tuple[int, int], region: Region) -> np.ndarray:
    """The `region` of the picture `source` (W, H) resized to `target` (W, H) -> float32 [h, w, 3], 0 to 1.

    Only what it depends on is read; the result is that of resizing the whole.
    """
    top, bottom, left, right = region
    first_row, last_row, *rows = _needed(top, bottom, source[1], target[1])
    first_column, last_column, *columns = _needed(left, right, source[0], target[0])
    pixels = read(first_row, last_row, first_column, last_column)
    box = (columns[0], rows[0], columns[1], rows[1])
    planes = [_resized_plane(pixels[..., channel], (right - left, bottom - top), box) for channel in range(3)]
    return np.clip(np.stack(planes, axis=-1), 0, 1)


def _needed(start: int, stop: int, source: int, target: int) -> tuple[int, int, float, float]:
    """What [start, stop) of `target` pixels depends on: [first, last) of `source`, and where in it they lie."""
    scale = source / target
    reach = math.ceil(LANCZOS_SUPPORT * max(scale, 1)) + 1
    first, last = max(0, math.floor(start * scale) - reach), min(source, math.ceil(stop * scale) + reach)
    return first, last, start * scale - first, stop * scale - first


def _resized_plane(plane: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    # Mode F, one channel at a time, is the only one in which Pillow resizes more than 8 bits.
    image = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box))
