"""Passes over maps: convolve strip by strip, write, and gather statistics on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from linfusion_cli.core.geometry import split_evenly
from linfusion_cli.strips.communicator import Communicator
from linfusion_cli.strips.dilation import halo_rows, inner
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.stats import Moments
from linfusion_cli.strips.storage import Storage
from linfusion_cli.strips.windows import Source, Windows

GOOD_ROWS = 16  # below, convolutions take longer: maps go to the host first
PIECE_MULTIPLE = 64  # tokens: matrix products of other numbers of rows are slower
MIN_TOKENS = 64  # fewer save nothing: a row of a picture of 512 px has as many


@dataclass(frozen=True)
class StripSize:
    """How much is computed at a time: `tokens` where pixels do not see each other, rows where they do.

    A strip has `rows` rows, or as many as make `tokens` pixels if that is more: narrow maps need tall strips to keep
    a processor busy.
    """

    rows: int = 16
    tokens: int = 1024

    def rows_of(self, width: int) -> int:
        """The height of strips of a map of this width."""
        return max(self.rows, self.tokens // width)

    @property
    def is_smallest(self) -> bool:
        return self.rows == 1 and self.tokens <= MIN_TOKENS

    def halved(self) -> StripSize:
        """Half the rows and half the tokens, down to the smallest."""
        return StripSize(max(1, self.rows // 2), max(MIN_TOKENS, self.tokens // 2))


@dataclass(frozen=True)
class Strips:
    """How a network runs in strips: their size, where maps wait, who has the other rows, and the dilation.

    `compiled` has the code that tokens go through compiled by torch, once for each shape of a piece.
    """

    size: StripSize
    storage: Storage
    exchange: Communicator
    dilation: int = 1
    compiled: bool = False

    def smaller(self) -> Strips | None:
        """The next way to run with less memory: lower strips, then maps further out, then strips of a row; or None."""
        outer = self.storage.move_to_host()
        if self.size.rows <= GOOD_ROWS and outer is not None:
            return replace(self, storage=outer)
        return None if self.size.is_smallest else replace(self, size=self.size.halved())

    def bands(self, height: int, width: int) -> list[tuple[int, int]]:
        """The strips [top, bottom) of a map."""
        return list(split_evenly(height, self.size.rows_of(width)))

    def pieces(self, tokens: FeatureMap) -> Iterator[tuple[int, int]]:
        """The pieces [start, stop) of a map of one pixel a row."""
        return split_evenly(tokens.height, self.size.tokens, PIECE_MULTIPLE)

    def halo(self, convolution: nn.Module) -> int:
        """How many rows beyond its own an output row of `convolution` looks at."""
        return halo_rows(inner(convolution), self.dilation)

    def like(self, source: FeatureMap, channels: int) -> FeatureMap:
        """A new map of the size of `source`."""
        return self.storage.new(*source.shape[:3], channels)


def convolved(run: Strips, convolution: nn.Module, source: Source) -> Iterator[tuple[int, Tensor]]:
    """`convolution` over `source`: (top, rows [B, n, W', C']) of the result, strip by strip from top to bottom.

    It must leave the padding of rows to us: see dilation.rows_supplied.
    """
    stride, halo = inner(convolution).stride[0], run.halo(convolution)
    height, width = -(-source.height // stride), -(-source.width // stride)
    strips = run.bands(height, width)
    spans = [(top * stride - halo, (bottom - 1) * stride + halo + 1) for top, bottom in strips]
    batch, tallest = source.parts[0].shape[0], max(stop - start for start, stop in spans)
    windows = Windows(source, batch, tallest, run.storage.dtype, run.storage.device)
    for (top, _), span in zip(strips, spans, strict=True):
        yield top, as_nhwc(convolution(as_nchw(windows.rows(*span))))


def as_nchw(rows: Tensor) -> Tensor:
    """Rows [B, n, W, C] as convolutions take them, [B, C, n, W] in channels-last: a view."""
    return rows.permute(0, 3, 1, 2)


def as_nhwc(image: Tensor) -> Tensor:
    """[B, C, n, W] -> rows [B, n, W, C]; a view where the memory is channels-last."""
    return image.permute(0, 2, 3, 1)


class Writer:
    """Writes a map from top to bottom and gathers its moments on the way."""

    def __init__(self, target: FeatureMap):
        self._target = target
        self._moments: Moments | None = None

    def write(self, top: int, rows: Tensor) -> None:
        self._target.write(top, rows)
        seen = Moments.of(rows)
        self._moments = seen if self._moments is None else self._moments + seen

    def close(self, exchange: Communicator) -> FeatureMap:
        """The map, which has been written whole, with its moments over all devices."""
        self._target.moments = self._moments.of_all(exchange)
        return self._target
