"""Lanczos resizing of an image, region by region."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

LANCZOS_SUPPORT = 3

Region = tuple[int, int, int, int]  # top, bottom, left, right
ReadRegion = Callable[[int, int, int, int], np.ndarray]  # -> float32 [bottom - top, right - left, 3]


def resize_region(read: ReadRegion, source: tuple[int, int], target: tuple[int, int], region: Region) -> np.ndarray:
    """Resize an image from `source` (W, H) to `target` (W, H) and return `region` as float32 [h, w, 3] in [0, 1].

    Reads only the source pixels that the region depends on. The result equals the region of the whole resized image.
    """
    top, bottom, left, right = region
    first_row, last_row, *rows = _find_source_range(top, bottom, source[1], target[1])
    first_column, last_column, *columns = _find_source_range(left, right, source[0], target[0])
    pixels = read(first_row, last_row, first_column, last_column)
    box = (columns[0], rows[0], columns[1], rows[1])
    planes = [_resize_plane(pixels[..., channel], (right - left, bottom - top), box) for channel in range(3)]
    return np.clip(np.stack(planes, axis=-1), 0, 1)


def _find_source_range(start: int, stop: int, source: int, target: int) -> tuple[int, int, float, float]:
    """Return the range [first, last) of `source` on which [start, stop) of `target` depends.

    The last two values are the positions of `start` and `stop` in that range, in source pixels.
    """
    scale = source / target
    reach = math.ceil(LANCZOS_SUPPORT * max(scale, 1)) + 1
    first, last = max(0, math.floor(start * scale) - reach), min(source, math.ceil(stop * scale) + reach)
    return first, last, start * scale - first, stop * scale - first


def _resize_plane(plane: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    # Pillow resizes more than 8 bits only in mode F, which has one channel.
    image = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box))
