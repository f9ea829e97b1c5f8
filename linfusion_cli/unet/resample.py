"""Down- and upsampling in strips, and a UNet's input and output convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import cast

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from linfusion_cli.strips.dilation import unwrap_convolution
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.ops import MapWriter, StripContext, as_nchw, as_nhwc, convolve
from linfusion_cli.strips.stats import Moments
from linfusion_cli.strips.windows import NormalisedSource, RowSource, UpsampledSource

ReadRows = Callable[[int, int], Tensor]  # (top, bottom) -> rows [B, bottom - top, W, C]


class ComputedMap(FeatureMap):
    """A map that is never stored: `rows` computes the rows on every read.

    For SDXL's first convolution, 4 to 320 channels, this costs a ten-thousandth of a forward's work, four times. It
    saves the first skip connection, which is alive until the end: a fifth of the memory for maps.
    """

    def __init__(self, shape: tuple[int, int, int, int], rows: ReadRows):
        super().__init__(torch.empty(0))
        self.shape, self._rows = shape, rows
        self.is_read_only = True

    def release(self) -> None:
        """Do nothing: there is no memory to overwrite."""

    def read(self, top: int, bottom: int) -> Tensor:
        """Compute rows [B, bottom - top, W, C]."""
        return self._rows(top, bottom)

    def compute_moments(self, context: StripContext) -> ComputedMap:
        """Compute the moments over all devices and return this map."""
        strips = context.split_map(self.height, self.width)
        self.moments = reduce(add, (Moments.from_rows(self.read(*strip)) for strip in strips)).reduce(
            context.communicator
        )
        return self


def run_conv_in(context: StripContext, convolution: nn.Module, latents: Tensor) -> ComputedMap:
    """Apply the input convolution to latents [B, 4, h, w]. Return the first map, with moments."""
    return build_conv_in_map(context, convolution, latents).compute_moments(context)


def build_conv_in_map(context: StripContext, convolution: nn.Module, latents: Tensor) -> ComputedMap:
    """Return the first map as `run_conv_in` does, without moments."""
    halo, source = context.halo_rows(convolution), as_nhwc(latents)
    rows = RowSource([FeatureMap(source)], context.communicator, halo)

    def compute_rows(top: int, bottom: int) -> Tensor:
        window = source.new_empty(source.shape[0], bottom - top + 2 * halo, *source.shape[2:])
        rows.write(window, top - halo, bottom + halo)
        return as_nhwc(convolution(as_nchw(window)))

    batch, height, width, _ = source.shape
    return ComputedMap((batch, height, width, unwrap_convolution(convolution).out_channels), compute_rows)


def add_residual(context: StripContext, x: FeatureMap, residual: FeatureMap) -> FeatureMap:
    """Return the sum of `x` and a ControlNet's `residual`: written over `residual`, or computed if `x` is."""

    def rows(top: int, bottom: int) -> Tensor:
        return x.read(top, bottom) + residual.read(top, bottom)

    if isinstance(x, ComputedMap):
        return ComputedMap(x.shape, rows).compute_moments(context)
    result = MapWriter(residual)
    fill_map(context, result, rows, x)
    return result.close(context.communicator)


def fill_map(context: StripContext, target: FeatureMap | MapWriter, rows: ReadRows, like: FeatureMap) -> None:
    """Write `rows` into all of `target`, a map with the size of `like`."""
    for top, bottom in context.split_map(like.height, like.width):
        target.write(top, rows(top, bottom))


def run_downsample(context: StripContext, downsampler: Downsample2D, x: FeatureMap) -> FeatureMap:
    """Return `x` downsampled to half its size, rounded up."""
    return convolve_map(
        context, downsampler.conv, RowSource([x], context.communicator, context.halo_rows(downsampler.conv))
    )


def convolve_map(context: StripContext, convolution: nn.Module, source: RowSource) -> FeatureMap:
    """Return the complete result of a convolution as a new map."""
    stride, channels = unwrap_convolution(convolution).stride[0], unwrap_convolution(convolution).out_channels
    batch, height, width, _ = source.parts[0].shape
    result = MapWriter(context.storage.new(batch, -(-height // stride), -(-width // stride), channels))
    for top, rows in convolve(context, convolution, source):
        result.write(top, rows)
    return result.close(context.communicator)


def run_upsample(
    context: StripContext, upsampler: Upsample2D, x: FeatureMap, height: int, width: int, parts: int
) -> list[FeatureMap]:
    """Upsample `x` to `height` x `width` and apply the convolution. Return its channels split into `parts` maps."""
    convolution = cast(nn.Module, upsampler.conv)
    halo = context.halo_rows(convolution)
    source = UpsampledSource(x, context.communicator, (halo + 1) // 2, height, width, context.storage.device)
    channels = upsampler.out_channels // parts
    writers = [MapWriter(context.storage.new(x.shape[0], height, width, channels)) for _ in range(parts)]
    for top, rows in convolve(context, convolution, source):
        for writer, part in zip(writers, rows.split(channels, dim=-1), strict=True):
            writer.write(top, part)
    return [writer.close(context.communicator) for writer in writers]


def run_conv_out(
    context: StripContext, norm: nn.GroupNorm, activation: nn.Module, convolution: nn.Module, x: FeatureMap
) -> Tensor:
    """Compute the UNet's prediction [B, 4, h, w] from the last map."""
    source = NormalisedSource([x], context.communicator, context.halo_rows(convolution), norm, activation)
    batch, height, width, _ = x.shape
    channels = unwrap_convolution(convolution).out_channels
    prediction = torch.empty(batch, channels, height, width, dtype=context.storage.dtype, device=context.storage.device)
    target = FeatureMap(as_nhwc(prediction))
    for top, rows in convolve(context, convolution, source):
        target.write(top, rows)
    return prediction
