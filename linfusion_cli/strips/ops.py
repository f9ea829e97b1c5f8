"""Passes over feature maps: convolve strip by strip, write the result and accumulate statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from linfusion_cli.core.geometry import split_evenly
from linfusion_cli.strips.communicator import Communicator
from linfusion_cli.strips.dilation import halo_rows, unwrap_convolution
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.stats import Moments
from linfusion_cli.strips.storage import Storage
from linfusion_cli.strips.windows import RowSource, Windows

MIN_EFFICIENT_ROWS = 16  # lower strips slow convolutions down, so maps move to the host first
PIECE_MULTIPLE = 64  # tokens; matrix products with other numbers of rows are slower
MIN_TOKENS = 64  # one row of a 512 px image; fewer would not save memory


@dataclass(frozen=True)
class StripSize:
    """The amount of work per step: `tokens` for operations on single pixels, `rows` for convolutions.

    A strip has `rows` rows, or more if `tokens` pixels need more: narrow maps require tall strips for good utilisation.
    """

    rows: int = 16
    tokens: int = 1024

    def rows_for(self, width: int) -> int:
        """Return the height of strips of a map of this width."""
        return max(self.rows, self.tokens // width)

    @property
    def is_smallest(self) -> bool:
        """Whether the size cannot be reduced further."""
        return self.rows == 1 and self.tokens <= MIN_TOKENS

    def halve(self) -> StripSize:
        """Return half the rows and half the tokens, but not less than the minimum."""
        return StripSize(max(1, self.rows // 2), max(MIN_TOKENS, self.tokens // 2))


@dataclass(frozen=True)
class StripContext:
    """Settings for running a network in strips: strip size, storage of maps, communicator and dilation.

    With `compiled`, the per-token code of transformers is compiled with torch.compile, once per shape of a piece.
    """

    size: StripSize
    storage: Storage
    communicator: Communicator
    dilation: int = 1
    compiled: bool = False

    def reduce_memory(self) -> StripContext | None:
        """Return the next settings that need less memory, None after the last ones.

        The order is: halve strips to MIN_EFFICIENT_ROWS, move maps to the host, halve strips down to one row.
        """
        storage = self.storage.move_to_host()
        if self.size.rows <= MIN_EFFICIENT_ROWS and storage is not None:
            return replace(self, storage=storage)
        return None if self.size.is_smallest else replace(self, size=self.size.halve())

    def split_map(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the strips [top, bottom) of a map."""
        return list(split_evenly(height, self.size.rows_for(width)))

    def split_tokens(self, tokens: FeatureMap) -> Iterator[tuple[int, int]]:
        """Return the pieces [start, stop) of a map with one pixel per row."""
        return split_evenly(tokens.height, self.size.tokens, PIECE_MULTIPLE)

    def halo_rows(self, convolution: nn.Module) -> int:
        """Return the number of rows that `convolution` reads above and below an output row."""
        return halo_rows(unwrap_convolution(convolution), self.dilation)

    def new_like(self, source: FeatureMap, channels: int) -> FeatureMap:
        """Return a new map with the size of `source`."""
        return self.storage.new(*source.shape[:3], channels)


def convolve(context: StripContext, convolution: nn.Module, source: RowSource) -> Iterator[tuple[int, Tensor]]:
    """Apply `convolution` to `source`. Yield (top, rows [B, n, W', C']) of the result, from top to bottom.

    The convolution must not pad rows: see dilation.skip_row_padding.
    """
    stride, halo = unwrap_convolution(convolution).stride[0], context.halo_rows(convolution)
    height, width = -(-source.height // stride), -(-source.width // stride)
    strips = context.split_map(height, width)
    spans = [(top * stride - halo, (bottom - 1) * stride + halo + 1) for top, bottom in strips]
    batch, tallest = source.parts[0].shape[0], max(stop - start for start, stop in spans)
    windows = Windows(source, batch, tallest, context.storage.dtype, context.storage.device)
    for (top, _), span in zip(strips, spans, strict=True):
        yield top, as_nhwc(convolution(as_nchw(windows.rows(*span))))


def as_nchw(rows: Tensor) -> Tensor:
    """Return rows [B, n, W, C] as a view [B, C, n, W] in channels-last memory format, as convolutions expect."""
    return rows.permute(0, 3, 1, 2)


def as_nhwc(image: Tensor) -> Tensor:
    """Return [B, C, n, W] as rows [B, n, W, C]; a view if the memory format is channels-last."""
    return image.permute(0, 2, 3, 1)


class MapWriter:
    """Writes a map from top to bottom and accumulates its moments."""

    def __init__(self, target: FeatureMap):
        self._target = target
        self._moments: Moments | None = None

    def write(self, top: int, rows: Tensor) -> None:
        """Write rows [B, n, W, C] from row `top` on."""
        self._target.write(top, rows)
        moments = Moments.from_rows(rows)
        self._moments = moments if self._moments is None else self._moments + moments

    def close(self, communicator: Communicator) -> FeatureMap:
        """Return the completed map with its moments over all devices."""
        assert self._moments is not None  # the complete map has been written
        self._target.moments = self._moments.reduce(communicator)
        return self._target
