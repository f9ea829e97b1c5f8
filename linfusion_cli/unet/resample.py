"""Down- and upsampling in strips, and the way into and out of a UNet's maps."""

from __future__ import annotations

from functools import reduce
from operator import add

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from linfusion_cli.strips.dilation import inner
from linfusion_cli.strips.ops import Strips, Writer, as_picture, as_rows, convolved
from linfusion_cli.strips.stats import Moments
from linfusion_cli.strips.storage import Map
from linfusion_cli.strips.windows import Enlarged, Normed, Source


class Computed(Map):
    """A convolution of a map with so few channels that its rows are computed whenever they are read, and never stored.

    For SDXL's first convolution, 4 channels to 320, that is a ten-thousandth of a forward's work, four times, and the
    first skip connection, which waits until the end, a fifth of its maps.
    """

    def __init__(self, run: Strips, convolution: nn.Module, source: Map):
        super().__init__(source.tensor)
        self._run, self._convolution = run, convolution
        self._source = Source([source], run.exchange, run.halo(convolution))
        self.kept = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (*self._source.parts[0].shape[:3], inner(self._convolution).out_channels)

    def release(self) -> None:
        """Nothing to write over becomes free."""

    def read(self, top: int, bottom: int) -> Tensor:
        halo = self._run.halo(self._convolution)
        batch, _, width, channels = self._source.parts[0].shape
        window = self.tensor.new_empty(batch, bottom - top + 2 * halo, width, channels)
        self._source.put(window, top - halo, bottom + halo)
        return as_rows(self._convolution(as_picture(window)))


def run_conv_in(run: Strips, convolution: nn.Module, latents: Tensor) -> Map:
    """Latents [B, 4, h, w] -> the first map."""
    result = Computed(run, convolution, Map(as_rows(latents)))
    strips = run.bands(result.height, result.width)
    result.moments = reduce(add, (Moments.of(result.read(*strip)) for strip in strips)).of_all(run.exchange)
    return result


def run_downsample(run: Strips, downsampler: Downsample2D, x: Map) -> Map:
    """`x` at half its size, rounded up."""
    return written(run, downsampler.conv, Source([x], run.exchange, run.halo(downsampler.conv)))


def written(run: Strips, convolution: nn.Module, source: Source) -> Map:
    """The whole result of a convolution as a new map."""
    stride, channels = inner(convolution).stride[0], inner(convolution).out_channels
    batch, height, width, _ = source.parts[0].shape
    result = Writer(run.storage.new(batch, -(-height // stride), -(-width // stride), channels))
    for top, rows in convolved(run, convolution, source):
        result.write(top, rows)
    return result.close(run.exchange)


def run_upsample(run: Strips, upsampler: Upsample2D, x: Map, height: int, width: int, parts: int) -> list[Map]:
    """`x` enlarged to `height` x `width` and convolved, its channels in so many maps side by side."""
    halo = run.halo(upsampler.conv)
    source = Enlarged(x, run.exchange, (halo + 1) // 2, height, width, run.storage.device)
    channels = upsampler.out_channels // parts
    writers = [Writer(run.storage.new(x.shape[0], height, width, channels)) for _ in range(parts)]
    for top, rows in convolved(run, upsampler.conv, source):
        for writer, part in zip(writers, rows.split(channels, dim=-1), strict=True):
            writer.write(top, part)
    return [writer.close(run.exchange) for writer in writers]


def run_conv_out(run: Strips, norm: nn.GroupNorm, activation: nn.Module, convolution: nn.Module, x: Map) -> Tensor:
    """The last map -> what the UNet predicts [B, 4, h, w]."""
    source = Normed([x], run.exchange, run.halo(convolution), norm, activation)
    batch, height, width, _ = x.shape
    channels = inner(convolution).out_channels
    prediction = torch.empty(batch, channels, height, width, dtype=run.storage.dtype, device=run.storage.device)
    target = Map(as_rows(prediction))
    for top, rows in convolved(run, convolution, source):
        target.write(top, rows)
    return prediction
