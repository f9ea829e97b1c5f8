"""Down- and upsampling in strips, and the way into and out of a UNet's maps."""

from __future__ import annotations

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from linfusion_cli.strips.dilation import inner
from linfusion_cli.strips.ops import Strips, Writer, as_rows, convolved
from linfusion_cli.strips.storage import Map
from linfusion_cli.strips.windows import Enlarged, Normed, Source


def run_conv_in(run: Strips, convolution: nn.Module, latents: Tensor) -> Map:
    """Latents [B, 4, h, w] -> the first map."""
    return written(run, convolution, Source([Map(as_rows(latents))], run.exchange, run.halo(convolution)))


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
    source = Enlarged(x, run.exchange, (halo + 1) // 2, height, width)
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
