"""Lanczos resizing of a picture that is read and made by rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

LANCZOS_SUPPORT = 3

ReadRows = Callable[[int, int], np.ndarray]  # (top, bottom) -> float32 rows [bottom - top, W, 3]


def resized_rows(read: ReadRows, source: tuple[int, int], target: tuple[int, int], top: int, bottom: int) -> np.ndarray:
    """Rows top..bottom of the picture `source` (W, H) resized to `target` (W, H) -> float32 [bottom - top, W, 3].

    Values are 0 to 1. Only the source rows that these depend on are read; the result is that of resizing the whole.
    """
    scale = source[1] / target[1]
    reach = math.ceil(LANCZOS_SUPPORT * max(scale, 1)) + 1
    first = max(0, math.floor(top * scale) - reach)
    last = min(source[1], math.ceil(bottom * scale) + reach)
    rows = read(first, last)
    box = (0, top * scale - first, source[0], bottom * scale - first)
    planes = [_resized_plane(rows[..., channel], (target[0], bottom - top), box) for channel in range(3)]
    return np.clip(np.stack(planes, axis=-1), 0, 1)


def _resized_plane(plane: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    # Mode F, one channel at a time, is the only one in which Pillow resizes more than 8 bits.
    image = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box))
