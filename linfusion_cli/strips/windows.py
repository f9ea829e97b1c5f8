"""What a convolution reads: rows of maps, changed on the way, in windows of which each shares rows with the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from linfusion_cli.strips.communicator import Communicator
from linfusion_cli.strips.feature_map import FeatureMap, HostFeatureMap
from linfusion_cli.strips.stats import Moments, group_affine

OnRead = Callable[[int, list[Tensor]], None]  # (top, rows of each part) once they have been read and are still whole


class Source:
    """Rows of one or several maps of one size, their channels side by side; beyond the picture's edges rows are zero.

    `halo` is how many rows of a neighbour's part a window may reach into.
    """

    def __init__(self, parts: Sequence[FeatureMap], exchange: Communicator, halo: int):
        self.parts = parts
        self.height, self.width = parts[0].height, parts[0].width
        self.channels = sum(part.channels for part in parts)
        self._borders = [exchange.halo(part, halo) for part in parts] if halo else []

    def put(self, out: Tensor, top: int, bottom: int) -> None:
        """Write rows [top, bottom), which may reach beyond the map, into `out` [B, bottom - top, W, C]."""
        for start, stop in _cut(top, bottom, self.height):
            target = out[:, start - top : stop - top]
            rows = self._rows(start, stop)
            if rows is None:
                target.zero_()
            else:
                self.change(target, rows, start)

    def change(self, out: Tensor, rows: list[Tensor], top: int) -> None:
        """Write into `out` what becomes of `rows`, those of each part from row `top` on: here, they stay the same."""
        out.copy_(torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0])

    def _rows(self, top: int, bottom: int) -> list[Tensor] | None:
        """The rows of each part, from this device or a neighbour; None beyond the picture's edge."""
        if top >= 0 and bottom <= self.height:
            return [part.read(top, bottom) for part in self.parts]
        if top < 0:
            above = [border[0] for border in self._borders]
            return None if above[0] is None else [rows[:, rows.shape[1] + top :][:, : bottom - top] for rows in above]
        below = [border[1] for border in self._borders]
        return None if below[0] is None else [rows[:, top - self.height : bottom - self.height] for rows in below]


def _cut(top: int, bottom: int, height: int) -> Iterator[tuple[int, int]]:
    """[top, bottom) cut at a map's first and last row."""
    places = [top, *(place for place in (0, height) if top < place < bottom), bottom]
    return ((start, stop) for start, stop in zip(places, places[1:], strict=False) if start < stop)


class Normed(Source):
    """Rows after GroupNorm over all parts' channels and an activation; `on_read` sees them before."""

    def __init__(
        self,
        parts: Sequence[FeatureMap],
        exchange: Communicator,
        halo: int,
        norm: nn.GroupNorm,
        activation: nn.Module | None,
        on_read: OnRead | None = None,
    ):
        super().__init__(parts, exchange, halo)
        self._scale, self._shift = group_affine(norm, Moments.side_by_side([part.moments for part in parts]))
        self._activation, self._on_read = activation, on_read

    def change(self, out: Tensor, rows: list[Tensor], top: int) -> None:
        start = 0
        for part in rows:
            channels = slice(start, start + part.shape[-1])
            out[..., channels] = self.normed(part, channels)
            start = channels.stop
        if self._on_read is not None and 0 <= top < self.height:
            self._on_read(top, rows)

    def normed(self, rows: Tensor, channels: slice = slice(None)) -> Tensor:
        """Rows [B, n, W, C] of some of the channels, normalised and activated, in the statistics' dtype."""
        normal = torch.addcmul(self._shift[..., channels], rows, self._scale[..., channels])
        return normal if self._activation is None else self._activation(normal)


class Enlarged(Source):
    """Rows of a small map repeated to `height` x `width`, as F.interpolate repeats them (mode "nearest").

    The enlarged map is never whole: a window of it is made from the few rows it repeats.
    """

    def __init__(
        self, small: FeatureMap, exchange: Communicator, halo: int, height: int, width: int, device: torch.device
    ):
        super().__init__([small], exchange, halo)
        self._small = small.height
        self.height, self.width = height, width
        # On the CPU too: to know what to read must not wait for the device.
        (self._row_of, self._rows_on_device), (_, self._columns) = (
            places(*pair, small.tensor.dtype, device) for pair in ((small.height, height), (small.width, width))
        )
        self._last: tuple[int, Tensor] | None = None  # the last row that was read, which the next strip may repeat too

    def _rows(self, top: int, bottom: int) -> list[Tensor] | None:
        if top < 0 or bottom > self.height:
            return self._beyond(top, bottom)
        first = int(self._row_of[top])
        small = self._small_rows(first, int(self._row_of[bottom - 1]) + 1)
        return [self._repeated(small, self._rows_on_device[top:bottom] - first)]

    def _small_rows(self, first: int, end: int) -> Tensor:
        """Rows [first, end) of the small map; on the host each is read once, as it travels."""
        if not isinstance(self.parts[0], HostFeatureMap):
            return self.parts[0].read(first, end)
        held = self._last[1] if self._last and self._last[0] == first else None
        start = first if held is None else first + 1
        parts = [held] if held is not None else []
        if start < end:
            parts.append(self.parts[0].read(start, end))
        small = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        self._last = end - 1, small[:, -1:].clone()
        return small

    def _beyond(self, top: int, bottom: int) -> list[Tensor] | None:
        """Rows of a neighbour's part; where parts meet, a map's height doubles exactly."""
        border = self._borders[0][0 if top < 0 else 1]
        if border is None:
            return None
        rows = torch.arange(top, bottom, device=border.device).div(2, rounding_mode="floor")
        return [self._repeated(border, rows + border.shape[1] if top < 0 else rows - self._small)]

    def _repeated(self, small: Tensor, rows: Tensor) -> Tensor:
        return small.index_select(2, self._columns).index_select(1, rows)


@lru_cache(maxsize=64)  # at a copy of each, the device would wait in every forward
def places(length: int, longer: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `nearest`, on the CPU and on `device`."""
    found = nearest(length, longer, dtype)
    return found, found.to(device)


def nearest(length: int, longer: int, dtype: torch.dtype) -> Tensor:
    """Which of `length` places each of `longer` ones repeats [longer] in a map of `dtype`.

    Torch itself is asked, as it rounds in fp32 for all but fp64: 2095 places to 4189 differ by one here and there.
    """
    places = torch.arange(length, dtype=torch.promote_types(dtype, torch.float32))[None, None]
    return torch.nn.functional.interpolate(places, size=longer, mode="nearest")[0, 0].long()


class Windows:
    """Windows [B, n, W, C] of a source, one after the other, in one buffer: each is overwritten by the next.

    Rows that a window shares with the next are carried over, not read and changed again: so a pass may write over all
    rows that it has read.
    """

    def __init__(self, source: Source, batch: int, rows: int, dtype: torch.dtype, device: torch.device):
        self._source = source
        self._buffer = torch.empty(batch, rows, source.width, source.channels, dtype=dtype, device=device)
        self._held = (-1 << 62, -1 << 62)  # the rows in the buffer: none yet

    def rows(self, start: int, stop: int) -> Tensor:
        """The window of rows [start, stop), which begins where the one before it did, or later."""
        window = self._buffer[:, : stop - start]
        shared = max(0, self._held[1] - start)
        if shared:
            begin = start - self._held[0]
            window[:, :shared] = self._buffer[:, begin : begin + shared].clone()  # both may overlap
        self._source.put(window[:, shared:], start + shared, stop)
        self._held = (start, stop)
        return window
