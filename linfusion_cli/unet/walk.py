"""The order of a UNet's or a ControlNet's operations, told once: for running in strips, and for reckoning the cost."""

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


class Encoding(Protocol[M]):
    """What a walk through an encoder does with maps. Each returns a new map, or the given one, written over."""

    def conv_in(self) -> M: ...

    def resnet(self, block: ResnetBlock2D, parts: Sequence[M]) -> M: ...

    def transformer(self, transformer: Transformer2DModel, x: M) -> M: ...

    def downsample(self, downsampler: Downsample2D, x: M) -> M: ...

    def keep(self, x: M) -> M:
        """What is to wait of `x`, which goes on into the next operation: as a skip connection nobody writes over it."""

    def keep_middle(self, x: M) -> M:
        """The same of what comes from the middle; `x` ends here."""


class Operations(Encoding[M], Protocol):
    """What a walk through a whole UNet does."""

    def upsample(self, upsampler: Upsample2D, x: M, like: M, parts: int) -> list[M]:
        """`x` at the size of the map `like`, its channels in so many maps side by side."""

    def take(self, skip: M) -> M:
        """A skip connection that is about to be read for the last time."""

    def conv_out(self, x: M) -> None: ...


def walk(unet: UNet2DConditionModel, do: Operations[M]) -> None:
    """All operations of `unet` but its embeddings, in order.

    No name holds a map for longer than an operation may read it: memory depends on it.
    """
    skips, *hidden = encoded(unet, do)
    for block, following in zip_longest(unet.up_blocks, unet.up_blocks[1:]):
        for resnet, transformer in layers(block):
            hidden = [attended(do, transformer, do.resnet(resnet, [*hidden, do.take(skips.pop())]))]
        for upsampler in block.upsamplers or ():
            hidden = do.upsample(upsampler, hidden[0], skips[-1], parts_for(following, upsampler.out_channels))
    do.conv_out(hidden[0])


def encoded(network: nn.Module, do: Encoding[M]) -> tuple[list[M], M]:
    """The first half of a UNet, which is all of a ControlNet: what is kept on the way down, and of the middle."""
    x = do.conv_in()
    kept = [do.keep(x)]
    for block in network.down_blocks:
        for resnet, transformer in layers(block):
            x = attended(do, transformer, do.resnet(resnet, [x]))
            kept.append(do.keep(x))
        for downsampler in block.downsamplers or ():
            x = do.downsample(downsampler, x)
            kept.append(do.keep(x))
    return kept, do.keep_middle(middle(network.mid_block, do, x))


def middle(block: nn.Module | None, do: Encoding[M], x: M) -> M:
    """The middle block: a ResNet block, then pairs of transformer and ResNet block."""
    if block is None:
        return x
    x = do.resnet(block.resnets[0], [x])
    for transformer, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = do.resnet(resnet, [attended(do, transformer, x)])
    return x


def attended(do: Encoding[M], transformer: Transformer2DModel | None, x: M) -> M:
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
