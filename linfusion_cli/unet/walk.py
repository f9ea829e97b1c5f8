"""The order of a UNet's operations, told once: for running it in strips, and for reckoning what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol, TypeVar

from diffusers import UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

M = TypeVar("M")  # a map


class Operations(Protocol[M]):
    """What a walk does with maps. Each returns a new map, or one of those given, which it has written over."""

    def conv_in(self) -> M: ...

    def resnet(self, block: ResnetBlock2D, parts: Sequence[M]) -> M: ...

    def transformer(self, transformer: Transformer2DModel, x: M) -> M: ...

    def downsample(self, downsampler: Downsample2D, x: M) -> M: ...

    def upsample(self, upsampler: Upsample2D, x: M, like: M, parts: int) -> list[M]:
        """`x` at the size of the map `like`, its channels in so many maps side by side."""

    def keep(self, x: M) -> M:
        """`x` as a skip connection, over which nobody writes."""

    def take(self, skip: M) -> M:
        """A skip connection that is about to be read for the last time."""

    def add_residual(self, skip: M, index: int, x: M) -> M:
        """`skip` with ControlNet's residual for it, if there is one; `x`, which may be `skip`, stays as it is."""

    def add_mid_residual(self, x: M) -> M:
        """`x`, which comes from the middle, with ControlNet's residual for it, if there is one."""

    def conv_out(self, x: M) -> None: ...


def walk(unet: UNet2DConditionModel, do: Operations[M]) -> None:
    """All operations of `unet` but its embeddings, in order.

    No name holds a map for longer than an operation may read it: memory depends on it.
    """
    x = do.conv_in()
    skips = [do.keep(x)]
    for block in unet.down_blocks:
        for resnet, transformer in layers(block):
            x = attended(do, transformer, do.resnet(resnet, [x]))
            skips.append(do.keep(x))
        for downsampler in block.downsamplers or ():
            x = do.downsample(downsampler, x)
            skips.append(do.keep(x))
    skips = [do.add_residual(skip, i, x) for i, skip in enumerate(skips)]
    x = do.add_mid_residual(middle(unet.mid_block, do, x))
    hidden = [x]
    del x
    for block, following in zip_longest(unet.up_blocks, unet.up_blocks[1:]):
        for resnet, transformer in layers(block):
            hidden = [attended(do, transformer, do.resnet(resnet, [*hidden, do.take(skips.pop())]))]
        for upsampler in block.upsamplers or ():
            hidden = do.upsample(upsampler, hidden[0], skips[-1], parts_for(following, upsampler.out_channels))
    do.conv_out(hidden[0])


def middle(block: nn.Module | None, do: Operations[M], x: M) -> M:
    """The middle block: a ResNet block, then pairs of transformer and ResNet block."""
    if block is None:
        return x
    x = do.resnet(block.resnets[0], [x])
    for transformer, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = do.resnet(resnet, [attended(do, transformer, x)])
    return x


def attended(do: Operations[M], transformer: Transformer2DModel | None, x: M) -> M:
    return x if transformer is None else do.transformer(transformer, x)


def layers(block: nn.Module) -> list[tuple[ResnetBlock2D, Transformer2DModel | None]]:
    """The ResNet blocks of a down or up block, each with the transformer that follows it, if one does."""
    return list(zip_longest(block.resnets, getattr(block, "attentions", ())))


def parts_for(following: nn.Module, channels: int) -> int:
    """How many maps an upsampled map's channels are put into.

    Maps as wide as the result of the block that reads them: it can then write over them.
    """
    out = following.resnets[0].out_channels
    return channels // out if channels % out == 0 else 1
