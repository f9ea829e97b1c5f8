"""A ResNet block in strips: two passes, one for each convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from linfusion_cli.strips.cost import CHANGES, WRITES, Cost, ExtraBytes, MetaMap, convolution_cost, max_strip_rows
from linfusion_cli.strips.dilation import inner
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.ops import Strips, StripSize, Writer, as_nchw, as_nhwc, convolved
from linfusion_cli.strips.windows import Normed

ReadRows = Callable[[int, int], Tensor]  # (top, bottom) -> rows [B, bottom - top, W, C]
Costed = tuple[int, int]  # itemsize and dilation of a forward whose cost is reckoned


def run_resnet(run: Strips, block: ResnetBlock2D, parts: Sequence[FeatureMap], embedding: Tensor) -> FeatureMap:
    """`block` over the channels of `parts` side by side, with the timestep's `embedding` [B, E].

    The first pass writes conv1's rows, the second conv2's over them. Where two of the parts are as wide as the result
    and nobody needs them any more, the result is written over the one and the shortcut over the other.
    """
    over = reusable(parts, block.out_channels)
    target, shortcut = over or (run.like(parts[0], block.out_channels), None)

    def keep_shortcut(top: int, rows: list[Tensor]) -> None:
        shortcut.write(top, shortcut_of(block, rows))

    on_read = keep_shortcut if shortcut else None
    source = Normed(parts, run.exchange, run.halo(block.conv1), block.norm1, block.nonlinearity, on_read)
    time_shift = block.time_emb_proj(block.nonlinearity(embedding))[:, None, None]
    hidden = Writer(target)
    for top, rows in convolved(run, block.conv1, source):
        hidden.write(top, rows + time_shift)
    hidden.close(run.exchange)

    source = Normed([target], run.exchange, run.halo(block.conv2), block.norm2, block.nonlinearity)
    read = shortcut.read if shortcut else late_shortcut(block, parts)
    result = Writer(target)
    for top, rows in convolved(run, block.conv2, source):
        result.write(top, rows + read(top, top + rows.shape[1]))
    return result.close(run.exchange)


def reusable(parts: Sequence[FeatureMap], channels: int) -> tuple[FeatureMap, FeatureMap] | None:
    """Two of `parts` that may be written over and have this many channels, if there are two.

    Without a middle block the last map is its own skip connection: it stands in `parts` twice, and is one.
    """
    free = [part for part in parts if part.channels == channels and not part.kept]
    others = [part for part in free[1:] if part is not free[0]]
    return (free[0], others[0]) if others else None


def shortcut_of(block: ResnetBlock2D, rows: list[Tensor]) -> Tensor:
    """What the block adds to its convolutions' result, from rows of each part."""
    joined = torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0]
    return joined if block.conv_shortcut is None else as_nhwc(block.conv_shortcut(as_nchw(joined)))


def late_shortcut(block: ResnetBlock2D, parts: Sequence[FeatureMap]) -> ReadRows:
    """The shortcut, computed when it is needed, from parts that are still whole then."""
    return lambda top, bottom: shortcut_of(block, [part.read(top, bottom) for part in parts])


def resnet_cost(
    size: StripSize, block: ResnetBlock2D, parts: Sequence[MetaMap], target: MetaMap, over: bool, setting: Costed
) -> Cost:
    """`run_resnet` on `parts`, written into `target`; `over` says that the shortcut is written over one of them."""
    itemsize, dilation = setting
    batch, height, width, _ = parts[0].shape
    shape, rows = (batch, height, width), max_strip_rows(size, height, width)
    strip = batch * rows * width * itemsize
    channels = sum(part.channels for part in parts)
    shortcut = strip * (channels * (len(parts) > 1) + block.out_channels * (block.conv_shortcut is not None))
    reading, writing = sum(part.reading(rows) for part in parts), target.writing(rows)
    first = ExtraBytes(reading + (shortcut if over else 0), writing * (2 if over else 1))
    second = ExtraBytes(target.reading(rows), writing, target.reading(rows) if over else shortcut + reading)
    cost = convolution_cost(size, block.conv1, shape, itemsize, dilation, max(part.channels for part in parts), first)
    cost += convolution_cost(size, block.conv2, shape, itemsize, dilation, beside=second)
    cost += Cost(2 * batch * inner(block.time_emb_proj).weight.numel(), 0, 0)
    if block.conv_shortcut is not None:
        flops = 2 * inner(block.conv_shortcut).weight.numel() * batch * height * width
        passes = (CHANGES * channels + WRITES * block.out_channels) * batch * height * width
        cost += Cost(flops, passes, 0)
    return cost
