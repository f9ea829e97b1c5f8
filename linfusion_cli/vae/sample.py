"""Positions where the statistics of an image are sampled, in integers and latents."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from linfusion_cli.core.geometry import Size

SEED = 0  # positions within grid cells are random: repeating patterns in an image could coincide with the grid


@dataclass(frozen=True)
class Sample:
    """Square cores of equal size in an image of `size` latents. `corners` has the (top, left) of each.

    Statistics are taken over the cores. A patch is a core with a halo: the latents around it that it depends on.
    """

    size: Size
    core: Size
    corners: tuple[tuple[int, int], ...]

    @staticmethod
    def full(size: Size) -> Sample:
        """Return a sample with one core, the full image."""
        return Sample(size, size, ((0, 0),))

    @staticmethod
    def on_grid(size: Size, count: int, core: int) -> Sample:
        """Return about `count` cores of `core` x `core` latents, each at a random position in a cell of a grid.

        If they would cover the image, or if the image is smaller than a core, return the full image.
        """
        if count * core**2 >= size.area or core > min(size.width, size.height):
            return Sample.full(size)
        columns = max(1, min(size.width // core, round(math.sqrt(count * size.width / size.height))))
        rows = max(1, min(size.height // core, round(count / columns)))
        places = random.Random(SEED)
        height, width = size.height, size.width
        corners = [
            (draw_position(places, row, rows, height, core), draw_position(places, column, columns, width, core))
            for row in range(rows)
            for column in range(columns)
        ]
        return Sample(size, Size(core, core), tuple(corners))

    def patch_size(self, halo: int) -> Size:
        """Return the size of all patches with `halo` latents around their cores, at most the size of the image."""
        width, height = self.core.width + 2 * halo, self.core.height + 2 * halo
        return Size(min(width, self.size.width), min(height, self.size.height))

    def patch_corners(self, halo: int) -> list[tuple[int, int]]:
        """Return the (top, left) of those patches. At the image's edges they are moved inside, so sizes stay equal."""
        patch = self.patch_size(halo)
        last_top, last_left = self.size.height - patch.height, self.size.width - patch.width
        return [(max(0, min(top - halo, last_top)), max(0, min(left - halo, last_left))) for top, left in self.corners]

    def pick_pixels(self, count: int) -> list[tuple[int, int, int]]:
        """Return about `count` pixels spread over the cores as (patch, row, column), or all pixels if there are fewer.

        Row and column are relative to the core.
        """
        places = random.Random(SEED)
        rows, columns = split_grid(self.core, max(1, round(count / len(self.corners))))
        height, width = self.core.height, self.core.width
        return [
            (patch, draw_position(places, row, rows, height, 1), draw_position(places, column, columns, width, 1))
            for patch in range(len(self.corners))
            for row in range(rows)
            for column in range(columns)
        ]


def split_grid(size: Size, count: int) -> tuple[int, int]:
    """Return rows and columns of about `count` nearly square cells on `size` pixels, with at least a pixel per cell."""
    columns = max(1, min(size.width, round(math.sqrt(count * size.width / size.height))))
    return max(1, min(size.height, round(count / columns))), columns


def draw_position(places: random.Random, cell: int, cells: int, length: int, extent: int) -> int:
    """Return a random position for `extent` units in cell number `cell` of `cells` along `length`.

    The lengths of cells differ by at most one.
    """
    start, stop = cell * length // cells, (cell + 1) * length // cells
    return places.randint(start, max(start, stop - extent))
