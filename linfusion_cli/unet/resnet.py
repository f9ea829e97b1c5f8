"""A ResNet block in strips, with one pass per convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from linfusion_cli.strips.cost import (
    RESULT_PASSES,
    WINDOW_PASSES,
    Cost,
    ExtraBytes,
    MetaMap,
    convolution_cost,
    max_strip_rows,
)
from linfusion_cli.strips.dilation import unwrap_convolution, unwrap_lora
from linfusion_cli.strips.feature_map import FeatureMap, MapShape
from linfusion_cli.strips.ops import MapWriter, StripContext, StripSize, as_nchw, as_nhwc, convolve
from linfusion_cli.strips.windows import NormalisedSource, OnRead

ReadRows = Callable[[int, int], Tensor]  # (top, bottom) -> rows [B, bottom - top, W, C]
M = TypeVar("M", bound=MapShape)


def run_resnet(
    context: StripContext, block: ResnetBlock2D, parts: Sequence[FeatureMap], embedding: Tensor
) -> FeatureMap:
    """Apply `block` to the concatenation of `parts` along channels, with the timestep `embedding` [B, E].

    The first pass writes the rows of conv1, the second overwrites them with those of conv2. If two of the parts are
    writable and have the result's channels, one is overwritten with the result and the other with the shortcut.
    """
    reusable = find_reusable(parts, block.out_channels)
    target, shortcut = reusable or (context.new_like(parts[0], block.out_channels), None)

    on_read = write_shortcut(block, shortcut) if shortcut else None
    source = NormalisedSource(
        parts, context.communicator, context.halo_rows(block.conv1), block.norm1, block.nonlinearity, on_read
    )
    time_shift = cast(nn.Module, block.time_emb_proj)(block.nonlinearity(embedding))[:, None, None]
    hidden = MapWriter(target)
    for top, rows in convolve(context, block.conv1, source):
        hidden.write(top, rows + time_shift)
    hidden.close(context.communicator)

    source = NormalisedSource(
        [target], context.communicator, context.halo_rows(block.conv2), block.norm2, block.nonlinearity
    )
    read = shortcut.read if shortcut else defer_shortcut(block, parts)
    result = MapWriter(target)
    for top, rows in convolve(context, block.conv2, source):
        result.write(top, rows + read(top, top + rows.shape[1]))
    return result.close(context.communicator)


def write_shortcut(block: ResnetBlock2D, target: FeatureMap) -> OnRead:
    """Return a function that writes the shortcut of the rows it is called with into `target`."""
    return lambda top, rows: target.write(top, compute_shortcut(block, rows))


def find_reusable(parts: Sequence[M], channels: int) -> tuple[M, M] | None:
    """Return two of `parts` that are writable and have `channels` channels, None if there are fewer.

    Without a middle block, the last map is also a skip connection: it appears twice in `parts`, but counts once.
    """
    candidates = [part for part in parts if part.channels == channels and not part.is_read_only]
    others = [part for part in candidates[1:] if part is not candidates[0]]
    return (candidates[0], others[0]) if others else None


def compute_shortcut(block: ResnetBlock2D, rows: list[Tensor]) -> Tensor:
    """Return the rows of the block's shortcut from rows of each part."""
    inputs = torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0]
    return inputs if block.conv_shortcut is None else as_nhwc(block.conv_shortcut(as_nchw(inputs)))


def defer_shortcut(block: ResnetBlock2D, parts: Sequence[FeatureMap]) -> ReadRows:
    """Return a function that computes the shortcut when it is read, from parts that are not overwritten."""
    return lambda top, bottom: compute_shortcut(block, [part.read(top, bottom) for part in parts])


def resnet_cost(
    size: StripSize,
    block: ResnetBlock2D,
    parts: Sequence[MetaMap],
    target: MetaMap,
    overwrites: bool,
    itemsize: int,
    dilation: int,
) -> Cost:
    """Return the cost of `run_resnet` on `parts`, written into `target`.

    `overwrites` is true if the shortcut is written over one of the parts.
    """
    batch, height, width, _ = parts[0].shape
    shape, rows = (batch, height, width), max_strip_rows(size, height, width)
    strip = batch * rows * width * itemsize
    channels = sum(part.channels for part in parts)
    shortcut = strip * (channels * (len(parts) > 1) + block.out_channels * (block.conv_shortcut is not None))
    reading, writing = sum(part.read_bytes(rows) for part in parts), target.write_bytes(rows)
    first = ExtraBytes(reading + (shortcut if overwrites else 0), writing * (2 if overwrites else 1))
    second = ExtraBytes(target.read_bytes(rows), writing, target.read_bytes(rows) if overwrites else shortcut + reading)
    cost = convolution_cost(size, block.conv1, shape, itemsize, dilation, max(part.channels for part in parts), first)
    cost += convolution_cost(size, block.conv2, shape, itemsize, dilation, extra=second)
    cost += Cost(2 * batch * cast(nn.Linear, unwrap_lora(cast(nn.Module, block.time_emb_proj))).weight.numel(), 0, 0)
    if block.conv_shortcut is not None:
        flops = 2 * unwrap_convolution(block.conv_shortcut).weight.numel() * batch * height * width
        passes = (WINDOW_PASSES * channels + RESULT_PASSES * block.out_channels) * batch * height * width
        cost += Cost(flops, passes, 0)
    return cost
