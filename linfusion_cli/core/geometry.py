"""Sizes of images and phases, and splitting of rows. Widths and heights are in pixels unless a name ends in `_lat`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

BASE_MULTIPLE_PX = 64
MIN_BASE_PX = 64
NEAR_TARGET = 0.9
MAX_ASPECT_ERROR = 0.1  # of a base or control image: small sizes come no closer, and a larger error is visible
ASPECT_TOLERANCE = 0.005  # relative; a deviation from the requested aspect ratio below this is invisible


@dataclass(frozen=True)
class Size:
    """Width and height of an image in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.width * self.height

    @property
    def pair(self) -> tuple[int, int]:
        """(width, height), as libraries take it."""
        return self.width, self.height

    def times(self, factor: int) -> Size:
        """Return the size with both sides multiplied by `factor`."""
        return Size(self.width * factor, self.height * factor)

    def divide(self, factor: int) -> Size:
        """Return the size with both sides divided by `factor`; raises ValueError if there is a remainder."""
        if self.width % factor or self.height % factor:
            raise ValueError(f"{self} is not a multiple of {factor}")
        return Size(self.width // factor, self.height // factor)

    def round_up(self, multiple: int) -> Size:
        """Return the size with both sides rounded up to a multiple."""
        return Size(_round_up(self.width, multiple), _round_up(self.height, multiple))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def compute_base_size(target: Size, native_px: int, multiple_px: int) -> Size:
    """Return the size with about the model's native area and the target's aspect ratio.

    Both sides are multiples of `compute_base_multiple`: of those just below and above the exact values, the pair with
    the smallest aspect error. With native_px = 1024, an image of 16384x8192 starts at 1408x704. Sides are at least
    64 px; the other side then follows the aspect ratio.
    """
    multiple = compute_base_multiple(native_px, multiple_px)
    stretch = math.sqrt(native_px**2 / target.area)
    stretch = max(stretch, MIN_BASE_PX / min(target.width, target.height))
    widths = _around(target.width * stretch, multiple)
    heights = _around(target.height * stretch, multiple)
    return min(
        (Size(width, height) for width in widths for height in heights), key=lambda size: aspect_error(size, target)
    )


def compute_base_multiple(native_px: int, multiple_px: int) -> int:
    """Return a sixteenth of the native size, at most 64 px, rounded up to `multiple_px`.

    Multiples of 64 px would distort the aspect ratio of small models by up to a fifth.
    """
    return _round_up(min(BASE_MULTIPLE_PX, native_px // 16), multiple_px)


def _around(value: float, multiple: int) -> list[int]:
    """Return the multiples just below and above `value`, the nearer one first."""
    below = max(1, math.floor(value / multiple)) * multiple
    return sorted({below, max(below, math.ceil(value / multiple) * multiple)}, key=lambda rounded: abs(rounded - value))


def aspect_error(size: Size, target: Size) -> float:
    """Return |log(aspect ratio of `size` / aspect ratio of `target`)|."""
    return abs(math.log(size.width * target.height / (size.height * target.width)))


def compute_phase_sizes(target: Size, base: Size, multiple_px: int) -> list[Size]:
    """Return the sizes of the phases from `base` to `target`; the model needs multiples of `multiple_px`.

    Each phase doubles the size while the double is below the target. The last phase is the target rounded up to the
    multiple, to be cropped. A double within a tenth of the target is omitted: it would cost as much as the last phase
    without a benefit. A target no larger than the base gives the base alone, to be downscaled.
    """
    last = target.round_up(multiple_px)
    if last == base or base.area >= target.area:
        return [base]
    sizes = [base]
    while sizes[-1].times(2).area < NEAR_TARGET**2 * target.area:
        sizes.append(sizes[-1].times(2))
    return [*sizes, last]


def compute_upscale_sizes(target: Size, image: Size, base: Size, multiple_px: int) -> list[Size]:
    """Return the sizes of the phases that upscale an image to `target`: doubles as in `compute_phase_sizes`.

    An image smaller than `base`, the model's native size in the same aspect ratio, is scaled to the base first; an
    image as large as the target has a single phase.
    """
    if image.area < NEAR_TARGET**2 * base.area:
        return compute_phase_sizes(target, base, multiple_px)
    start = image.round_up(multiple_px)
    _, *larger = compute_phase_sizes(target, start, multiple_px)
    return larger or [target.round_up(multiple_px)]


def compute_fit_size(box: Size, image: Size) -> Size | None:
    """Return the output size of an image for the requested `box`: a square box limits the longer side.

    Returns None if the aspect ratio of the box differs by more than a pixel and half a percent.
    """
    if box.width == box.height:
        scale = box.width / max(image.width, image.height)
        return Size(max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    height = box.width * image.height / image.width
    return box if abs(height - box.height) <= max(1, ASPECT_TOLERANCE * box.height) else None


def split_evenly(length: int, max_size: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the fewest ranges [start, stop) of at most `max_size`, equal up to `multiple`, in descending size.

    With equal strips, torch's allocator reuses the memory of earlier strips, and code is compiled only once.
    """
    count = -(-length // max_size)
    start = 0
    for left in range(count, 0, -1):
        size = min(max_size, -(-(length - start) // (left * multiple)) * multiple)
        stop = min(length, start + size)
        if start < stop:
            yield start, stop
        start = stop


def split_rows(length: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges [start, stop) of `rows` each; the last one can be shorter."""
    for start in range(0, length, rows):
        yield start, min(start + rows, length)
