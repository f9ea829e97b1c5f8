"""Down- and upsampling in strips, and the way into and out of a UNet's maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from linfusion_cli.strips.dilation import inner
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.ops import Strips, Writer, as_nchw, as_nhwc, convolved
from linfusion_cli.strips.stats import Moments
from linfusion_cli.strips.windows import Enlarged, Normed, Source

ReadRows = Callable[[int, int], Tensor]  # (top, bottom) -> rows [B, bottom - top, W, C]


class Computed(FeatureMap):
    """A map whose `rows` are computed whenever they are read, and never stored.

    For SDXL's first convolution, 4 channels to 320, that is a ten-thousandth of a forward's work, four times, and the
    first skip connection, which waits until the end, a fifth of its maps.
    """

    def __init__(self, shape: tuple[int, int, int, int], rows: ReadRows):
        super().__init__(torch.empty(0))
        self._shape, self._rows = shape, rows
        self.kept = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self._shape

    def release(self) -> None:
        """Nothing to write over becomes free."""

    def read(self, top: int, bottom: int) -> Tensor:
        return self._rows(top, bottom)

    def measured(self, run: Strips) -> Computed:
        """This map, which now has its moments."""
        strips = run.bands(self.height, self.width)
        self.moments = reduce(add, (Moments.of(self.read(*strip)) for strip in strips)).of_all(run.exchange)
        return self


def run_conv_in(run: Strips, convolution: nn.Module, latents: Tensor) -> Computed:
    """Latents [B, 4, h, w] -> the first map."""
    return computed_conv_in(run, convolution, latents).measured(run)


def computed_conv_in(run: Strips, convolution: nn.Module, latents: Tensor) -> Computed:
    """As `run_conv_in`, without moments."""
    halo, source = run.halo(convolution), as_nhwc(latents)
    rows = Source([FeatureMap(source)], run.exchange, halo)

    def convolved_rows(top: int, bottom: int) -> Tensor:
        window = source.new_empty(source.shape[0], bottom - top + 2 * halo, *source.shape[2:])
        rows.put(window, top - halo, bottom + halo)
        return as_nhwc(convolution(as_nchw(window)))

    return Computed((*source.shape[:3], inner(convolution).out_channels), convolved_rows)


def add_residual(run: Strips, x: FeatureMap, residual: FeatureMap) -> FeatureMap:
    """`x`, which stays as it is, with a ControlNet's `residual` added to it: written over that, or computed as `x`."""

    def rows(top: int, bottom: int) -> Tensor:
        return x.read(top, bottom) + residual.read(top, bottom)

    if isinstance(x, Computed):
        return Computed(x.shape, rows).measured(run)
    result = Writer(residual)
    fill(run, result, rows, x)
    return result.close(run.exchange)


def fill(run: Strips, target: FeatureMap | Writer, rows: ReadRows, like: FeatureMap) -> None:
    """Write `rows` into all of `target`, a map of the size of `like`."""
    for top, bottom in run.bands(like.height, like.width):
        target.write(top, rows(top, bottom))


def run_downsample(run: Strips, downsampler: Downsample2D, x: FeatureMap) -> FeatureMap:
    """`x` at half its size, rounded up."""
    return written(run, downsampler.conv, Source([x], run.exchange, run.halo(downsampler.conv)))


def written(run: Strips, convolution: nn.Module, source: Source) -> FeatureMap:
    """The whole result of a convolution as a new map."""
    stride, channels = inner(convolution).stride[0], inner(convolution).out_channels
    batch, height, width, _ = source.parts[0].shape
    result = Writer(run.storage.new(batch, -(-height // stride), -(-width // stride), channels))
    for top, rows in convolved(run, convolution, source):
        result.write(top, rows)
    return result.close(run.exchange)


def run_upsample(
    run: Strips, upsampler: Upsample2D, x: FeatureMap, height: int, width: int, parts: int
) -> list[FeatureMap]:
    """`x` enlarged to `height` x `width` and convolved, its channels in so many maps side by side."""
    halo = run.halo(upsampler.conv)
    source = Enlarged(x, run.exchange, (halo + 1) // 2, height, width, run.storage.device)
    channels = upsampler.out_channels // parts
    writers = [Writer(run.storage.new(x.shape[0], height, width, channels)) for _ in range(parts)]
    for top, rows in convolved(run, upsampler.conv, source):
        for writer, part in zip(writers, rows.split(channels, dim=-1), strict=True):
            writer.write(top, part)
    return [writer.close(run.exchange) for writer in writers]


def run_conv_out(
    run: Strips, norm: nn.GroupNorm, activation: nn.Module, convolution: nn.Module, x: FeatureMap
) -> Tensor:
    """The last map -> what the UNet predicts [B, 4, h, w]."""
    source = Normed([x], run.exchange, run.halo(convolution), norm, activation)
    batch, height, width, _ = x.shape
    channels = inner(convolution).out_channels
    prediction = torch.empty(batch, channels, height, width, dtype=run.storage.dtype, device=run.storage.device)
    target = FeatureMap(as_nhwc(prediction))
    for top, rows in convolved(run, convolution, source):
        target.write(top, rows)
    return prediction
