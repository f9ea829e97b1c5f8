"""Sizes of pictures and phases: integers only, no torch. Widths and heights are in pixels unless a name says `_lat`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

BASE_MULTIPLE_PX = 64
MIN_BASE_PX = 64
NEAR_TARGET = 0.9
MAX_ASPECT_ERROR = 0.1  # of a base or a control picture: those of a small one can come no closer, and more is seen
ASPECT_TOLERANCE = 0.005  # how far the proportions of a picture may be from those asked for: nobody sees it


@dataclass(frozen=True)
class Size:
    """Width and height of a picture in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def area(self) -> int:
        return self.width * self.height

    @property
    def pair(self) -> tuple[int, int]:
        """(width, height), for libraries."""
        return self.width, self.height

    def times(self, factor: int) -> Size:
        return Size(self.width * factor, self.height * factor)

    def divide(self, factor: int) -> Size:
        """Exact division, as from pixels to latents; raises ValueError if there is a rest."""
        if self.width % factor or self.height % factor:
            raise ValueError(f"{self} is not a multiple of {factor}")
        return Size(self.width // factor, self.height // factor)

    def round_up(self, multiple: int) -> Size:
        return Size(_round_up(self.width, multiple), _round_up(self.height, multiple))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def base_size(target: Size, native_px: int, multiple_px: int) -> Size:
    """The model's native area in the target's proportions, both sides a multiple of `base_multiple`.

    Of the multiples just below and above, those whose proportions come closest: with native_px = 1024, a picture of
    16384 x 8192 starts at 1408 x 704. A side that would fall under 64 px is 64 px; the other follows the proportions.
    """
    multiple = base_multiple(native_px, multiple_px)
    stretch = math.sqrt(native_px**2 / target.area)
    stretch = max(stretch, MIN_BASE_PX / min(target.width, target.height))
    widths = _around(target.width * stretch, multiple)
    heights = _around(target.height * stretch, multiple)
    return min(
        (Size(width, height) for width in widths for height in heights), key=lambda size: aspect_error(size, target)
    )


def base_multiple(native_px: int, multiple_px: int) -> int:
    """64 px for models of 512 px and more; less for smaller ones, where 64 px would bend the proportions by a fifth."""
    return _round_up(min(BASE_MULTIPLE_PX, native_px // 16), multiple_px)


def _around(value: float, multiple: int) -> list[int]:
    """The multiples just below and above `value`, the nearer first."""
    below = max(1, math.floor(value / multiple)) * multiple
    return sorted({below, max(below, math.ceil(value / multiple) * multiple)}, key=lambda found: abs(found - value))


def aspect_error(size: Size, target: Size) -> float:
    """How far the proportions of `size` are from the target's."""
    return abs(math.log(size.width * target.height / (size.height * target.width)))


def phase_sizes(target: Size, base: Size, multiple_px: int) -> list[Size]:
    """The resolutions to run, from `base` up; `multiple_px` is what the model's sides must be a multiple of.

    Phases double while the double is below the target; the last is the target rounded up to the multiple, to be
    cropped. A double within a tenth of the target is left out: it would cost as much as the last phase and add
    nothing. A target no larger than the base gives the base alone, to be reduced.
    """
    last = target.round_up(multiple_px)
    if last == base or base.area >= target.area:
        return [base]
    sizes = [base]
    while sizes[-1].times(2).area < NEAR_TARGET**2 * target.area:
        sizes.append(sizes[-1].times(2))
    return [*sizes, last]


def upscale_sizes(target: Size, image: Size, base: Size, multiple_px: int) -> list[Size]:
    """The resolutions through which a `picture` grows to `target`: doubles of its own size, as in `phase_sizes`.

    One that is smaller than the `base`, the model's native size in the same proportions, is taken to the base first;
    one that is as large as the target has a single phase.
    """
    if image.area < NEAR_TARGET**2 * base.area:
        return phase_sizes(target, base, multiple_px)
    start = image.round_up(multiple_px)
    _, *larger = phase_sizes(target, start, multiple_px)
    return larger or [target.round_up(multiple_px)]


def fit_size(box: Size, image: Size) -> Size | None:
    """The size that a `picture` gets where `box` is asked for: a square means its longer side.

    None where the box has other proportions, by more than a pixel and half a percent.
    """
    if box.width == box.height:
        scale = box.width / max(image.width, image.height)
        return Size(max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    height = box.width * image.height / image.width
    return box if abs(height - box.height) <= max(1, ASPECT_TOLERANCE * box.height) else None


def split_evenly(length: int, most: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """As few [start, stop) of at most `most` each as can be, equal but for `multiple`, the largest first.

    torch's allocator serves equal strips from the memory of those before, and compiled code is made once.
    """
    count = -(-length // most)
    start = 0
    for left in range(count, 0, -1):
        size = min(most, -(-(length - start) // (left * multiple)) * multiple)
        stop = min(length, start + size)
        if start < stop:
            yield start, stop
        start = stop


def split_rows(length: int, rows: int) -> Iterator[tuple[int, int]]:
    """Consecutive [start, stop) of `rows` each, the last one shorter."""
    for start in range(0, length, rows):
        yield start, min(start + rows, length)
