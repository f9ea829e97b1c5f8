"""The inputs of convolutions: rows of maps, transformed as they are read, in overlapping windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from linfusion_cli.strips.communicator import Communicator
from linfusion_cli.strips.feature_map import FeatureMap, HostFeatureMap
from linfusion_cli.strips.stats import Moments, group_affine

OnRead = Callable[[int, list[Tensor]], None]  # called with (top, rows of each part) before they are transformed


class RowSource:
    """Rows of one or several maps of equal size, concatenated along channels. Rows beyond the image's edges are zero.

    `halo` is the maximum number of rows that a window reads from a neighbour's part.
    """

    def __init__(self, parts: Sequence[FeatureMap], communicator: Communicator, halo: int):
        self.parts = parts
        self.height, self.width = parts[0].height, parts[0].width
        self.channels = sum(part.channels for part in parts)
        self._borders = [communicator.exchange_halo(part, halo) for part in parts] if halo else []

    def write(self, out: Tensor, top: int, bottom: int) -> None:
        """Write rows [top, bottom), which can extend beyond the map, into `out` [B, bottom - top, W, C]."""
        for start, stop in _split_at_edges(top, bottom, self.height):
            target = out[:, start - top : stop - top]
            rows = self._rows(start, stop)
            if rows is None:
                target.zero_()
            else:
                self.transform(target, rows, start)

    def transform(self, out: Tensor, rows: list[Tensor], top: int) -> None:
        """Write the transformed `rows` of all parts, which start at row `top`, into `out`; here, without a change."""
        out.copy_(torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0])

    def _rows(self, top: int, bottom: int) -> list[Tensor] | None:
        """Return the rows of each part, from this device or a neighbour; None beyond the image's edge."""
        if top >= 0 and bottom <= self.height:
            return [part.read(top, bottom) for part in self.parts]
        if top < 0:
            above = [border[0] for border in self._borders if border[0] is not None]
            return [rows[:, rows.shape[1] + top :][:, : bottom - top] for rows in above] or None
        below = [border[1] for border in self._borders if border[1] is not None]
        return [rows[:, top - self.height : bottom - self.height] for rows in below] or None


def _split_at_edges(top: int, bottom: int, height: int) -> Iterator[tuple[int, int]]:
    """Split [top, bottom) at the first and last row of the map."""
    bounds = [top, *(edge for edge in (0, height) if top < edge < bottom), bottom]
    return ((start, stop) for start, stop in zip(bounds, bounds[1:], strict=False) if start < stop)


class NormalisedSource(RowSource):
    """Rows after GroupNorm over the channels of all parts, and an activation. `on_read` receives the original rows."""

    def __init__(
        self,
        parts: Sequence[FeatureMap],
        communicator: Communicator,
        halo: int,
        norm: nn.GroupNorm,
        activation: nn.Module | None,
        on_read: OnRead | None = None,
    ):
        super().__init__(parts, communicator, halo)
        self._scale, self._shift = group_affine(norm, Moments.concat_channels([part.get_moments() for part in parts]))
        self._activation, self._on_read = activation, on_read

    def transform(self, out: Tensor, rows: list[Tensor], top: int) -> None:
        """Normalise and activate `rows` into `out`."""
        start = 0
        for part in rows:
            channels = slice(start, start + part.shape[-1])
            out[..., channels] = self.normalise(part, channels)
            start = channels.stop
        if self._on_read is not None and 0 <= top < self.height:
            self._on_read(top, rows)

    def normalise(self, rows: Tensor, channels: slice = slice(None)) -> Tensor:
        """Return rows [B, n, W, C] of the given channels, normalised and activated, in the statistics' dtype."""
        normal = torch.addcmul(self._shift[..., channels], rows, self._scale[..., channels])
        return normal if self._activation is None else self._activation(normal)


class UpsampledSource(RowSource):
    """Rows of a small map resized to `height` x `width` as F.interpolate does with mode "nearest".

    The upsampled map is never stored: each window is built from the few rows that it repeats.
    """

    def __init__(
        self, small: FeatureMap, communicator: Communicator, halo: int, height: int, width: int, device: torch.device
    ):
        super().__init__([small], communicator, halo)
        self._small = small.height
        self.height, self.width = height, width
        # Row indices are on the CPU too: choosing the rows to read must not synchronise with the device.
        (self._row_of, self._rows_on_device), (_, self._columns) = (
            cached_nearest_indices(*pair, small.tensor.dtype, device)
            for pair in ((small.height, height), (small.width, width))
        )
        self._last: tuple[int, Tensor] | None = None  # the last row read, which the next strip may need again

    def _rows(self, top: int, bottom: int) -> list[Tensor] | None:
        if top < 0 or bottom > self.height:
            return self._read_halo(top, bottom)
        first = int(self._row_of[top])
        small = self._small_rows(first, int(self._row_of[bottom - 1]) + 1)
        return [self._repeat(small, self._rows_on_device[top:bottom] - first)]

    def _small_rows(self, first: int, end: int) -> Tensor:
        """Return rows [first, end) of the small map; a map on the host is uploaded only once."""
        if not isinstance(self.parts[0], HostFeatureMap):
            return self.parts[0].read(first, end)
        last_row = self._last[1] if self._last and self._last[0] == first else None
        start = first if last_row is None else first + 1
        parts = [last_row] if last_row is not None else []
        if start < end:
            parts.append(self.parts[0].read(start, end))
        small = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        self._last = end - 1, small[:, -1:].clone()
        return small

    def _read_halo(self, top: int, bottom: int) -> list[Tensor] | None:
        """Return rows of a neighbour's part. With several parts, the height is exactly doubled."""
        border = self._borders[0][0 if top < 0 else 1]
        if border is None:
            return None
        rows = torch.arange(top, bottom, device=border.device).div(2, rounding_mode="floor")
        return [self._repeat(border, rows + border.shape[1] if top < 0 else rows - self._small)]

    def _repeat(self, small: Tensor, rows: Tensor) -> Tensor:
        return small.index_select(2, self._columns).index_select(1, rows)


@lru_cache(maxsize=64)  # copying them to the device in every forward would block
def cached_nearest_indices(length: int, longer: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `nearest_indices` on the CPU and on `device`."""
    indices = nearest_indices(length, longer, dtype)
    return indices, indices.to(device)


def nearest_indices(length: int, longer: int, dtype: torch.dtype) -> Tensor:
    """Return for each of `longer` positions which of `length` positions it repeats, for a map of `dtype`.

    The indices come from torch itself, which rounds in fp32 for all dtypes but fp64. For 2095 positions resized to
    4189, some indices differ by one between the two.
    """
    indices = torch.arange(length, dtype=torch.promote_types(dtype, torch.float32))[None, None]
    return torch.nn.functional.interpolate(indices, size=longer, mode="nearest")[0, 0].long()


class Windows:
    """Consecutive windows [B, n, W, C] of a source in one buffer; each window overwrites the previous one.

    Rows shared with the next window are copied within the buffer, not read and transformed again. A pass can therefore
    overwrite all rows that it has read.
    """

    def __init__(self, source: RowSource, batch: int, rows: int, dtype: torch.dtype, device: torch.device):
        self._source = source
        self._buffer = torch.empty(batch, rows, source.width, source.channels, dtype=dtype, device=device)
        self._buffered = (-1 << 62, -1 << 62)  # the rows in the buffer, initially none

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the window of rows [start, stop). `start` must not decrease between calls."""
        window = self._buffer[:, : stop - start]
        shared = max(0, self._buffered[1] - start)
        if shared:
            begin = start - self._buffered[0]
            window[:, :shared] = self._buffer[:, begin : begin + shared].clone()  # the slices may overlap
        self._source.write(window[:, shared:], start + shared, stop)
        self._buffered = (start, stop)
        return window
