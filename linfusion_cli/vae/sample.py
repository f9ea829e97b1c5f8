"""Where a picture's statistics are taken: patches spread evenly over it, or all of it. Integers only, in latents."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from linfusion_cli.core.geometry import Size

SEED = 0  # places within the cells of a grid are drawn, or whatever repeats in a picture could repeat with the grid


@dataclass(frozen=True)
class Sample:
    """Cores of one size in a picture of `size` latents, by the (top, left) of each.

    Statistics are taken over the cores; around each, a patch has what its core depends on.
    """

    size: Size
    core: Size
    corners: tuple[tuple[int, int], ...]

    @staticmethod
    def whole(size: Size) -> Sample:
        """All of the picture."""
        return Sample(size, size, ((0, 0),))

    @staticmethod
    def spread(size: Size, count: int, core: int) -> Sample:
        """About `count` cores of `core` x `core` latents, one anywhere in each cell of a grid; all, if that is less."""
        if count * core**2 >= size.area or core > min(size.width, size.height):
            return Sample.whole(size)
        columns = max(1, min(size.width // core, round(math.sqrt(count * size.width / size.height))))
        rows = max(1, min(size.height // core, round(count / columns)))
        places = random.Random(SEED)
        corners = [
            (drawn(places, row, rows, size.height, core), drawn(places, column, columns, size.width, core))
            for row in range(rows)
            for column in range(columns)
        ]
        return Sample(size, Size(core, core), tuple(corners))

    def window(self, halo: int) -> Size:
        """The size of all patches that reach `halo` beyond their cores, as far as there is picture."""
        width, height = self.core.width + 2 * halo, self.core.height + 2 * halo
        return Size(min(width, self.size.width), min(height, self.size.height))

    def windows(self, halo: int) -> list[tuple[int, int]]:
        """The (top, left) of those patches: moved inside at the picture's edges, so that all have one size."""
        window = self.window(halo)
        last_top, last_left = self.size.height - window.height, self.size.width - window.width
        return [(max(0, min(top - halo, last_top)), max(0, min(left - halo, last_left))) for top, left in self.corners]

    def pixels(self, count: int) -> list[tuple[int, int, int]]:
        """About `count` pixels spread over the cores, as (patch, row, column) in its core; all, if there are less."""
        places = random.Random(SEED)
        rows, columns = grid(self.core, max(1, round(count / len(self.corners))))
        return [
            (patch, drawn(places, row, rows, self.core.height, 1), drawn(places, column, columns, self.core.width, 1))
            for patch in range(len(self.corners))
            for row in range(rows)
            for column in range(columns)
        ]


def grid(size: Size, count: int) -> tuple[int, int]:
    """Rows and columns of about `count` cells, as square as can be, in a map of `size` pixels: one each at most."""
    columns = max(1, min(size.width, round(math.sqrt(count * size.width / size.height))))
    return max(1, min(size.height, round(count / columns))), columns


def drawn(places: random.Random, cell: int, cells: int, length: int, extent: int) -> int:
    """A place for something of `extent` in a cell of so many along `length`; cells may differ by one."""
    start, stop = cell * length // cells, (cell + 1) * length // cells
    return places.randint(start, max(start, stop - extent))
