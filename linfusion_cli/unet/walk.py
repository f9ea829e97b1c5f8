"""The order of operations of a UNet or ControlNet, shared by the execution in strips and the estimate of its cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol, TypeVar, cast

from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

Network = UNet2DConditionModel | ControlNetModel | ControlNetUnionModel
M = TypeVar("M")  # the type of maps


class EncoderVisitor(Protocol[M]):
    """The operations of an encoder on maps. Each returns a new map, or the given map, overwritten."""

    def conv_in(self) -> M:
        """Apply the input convolution."""
        ...

    def resnet(self, block: ResnetBlock2D, parts: Sequence[M]) -> M:
        """Apply a ResNet block to the concatenation of `parts`."""
        ...

    def transformer(self, transformer: Transformer2DModel, x: M) -> M:
        """Apply a transformer."""
        ...

    def downsample(self, downsampler: Downsample2D, x: M) -> M:
        """Downsample `x`."""
        ...

    def store_skip(self, x: M) -> M:
        """Return the skip connection for `x`, which is also the next operation's input and must not be overwritten."""
        ...

    def finish_middle(self, x: M) -> M:
        """Return the encoder's last map for the middle block's result `x`, which has no further use."""
        ...


class UNetVisitor(EncoderVisitor[M], Protocol):
    """The operations of a complete UNet."""

    def upsample(self, upsampler: Upsample2D, x: M, like: M, parts: int) -> list[M]:
        """Return `x` upsampled to the size of `like`, its channels split into `parts` maps."""
        ...

    def load_skip(self, skip: M) -> M:
        """Return a skip connection for its last read."""
        ...

    def conv_out(self, x: M) -> None:
        """Apply the output convolution."""
        ...


def walk_unet(unet: UNet2DConditionModel, visitor: UNetVisitor[M]) -> None:
    """Call the operations of `unet` in order, except its embeddings.

    No variable refers to a map longer than an operation reads it: the peak of memory depends on it.
    """
    skips, *hidden = walk_encoder(unet, visitor)
    blocks = cast(Sequence[nn.Module], unet.up_blocks)
    for block, following in zip_longest(blocks, blocks[1:]):
        for resnet, transformer in list_layers(block):
            hidden = [
                apply_transformer(
                    visitor, transformer, visitor.resnet(resnet, [*hidden, visitor.load_skip(skips.pop())])
                )
            ]
        for upsampler in cast(Sequence[Upsample2D], block.upsamplers or ()):
            hidden = visitor.upsample(upsampler, hidden[0], skips[-1], count_parts(following, upsampler.out_channels))
    visitor.conv_out(hidden[0])


def walk_encoder(network: Network, visitor: EncoderVisitor[M]) -> tuple[list[M], M]:
    """Call the operations of a UNet's first half, or of a ControlNet. Return the skip connections and the last map."""
    x = visitor.conv_in()
    skips = [visitor.store_skip(x)]
    for block in cast(Sequence[nn.Module], network.down_blocks):
        for resnet, transformer in list_layers(block):
            x = apply_transformer(visitor, transformer, visitor.resnet(resnet, [x]))
            skips.append(visitor.store_skip(x))
        for downsampler in cast(Sequence[Downsample2D], block.downsamplers or ()):
            x = visitor.downsample(downsampler, x)
            skips.append(visitor.store_skip(x))
    return skips, visitor.finish_middle(walk_middle(cast(nn.Module | None, network.mid_block), visitor, x))


def walk_middle(block: nn.Module | None, visitor: EncoderVisitor[M], x: M) -> M:
    """Call the operations of the middle block: a ResNet block, then pairs of transformer and ResNet block."""
    if block is None:
        return x
    resnets = cast(Sequence[ResnetBlock2D], block.resnets)
    transformers = cast(Sequence[Transformer2DModel | None], block.attentions)
    x = visitor.resnet(resnets[0], [x])
    for transformer, resnet in zip(transformers, resnets[1:], strict=True):
        x = visitor.resnet(resnet, [apply_transformer(visitor, transformer, x)])
    return x


def apply_transformer(visitor: EncoderVisitor[M], transformer: Transformer2DModel | None, x: M) -> M:
    """Call `transformer`, if there is one."""
    return x if transformer is None else visitor.transformer(transformer, x)


def list_layers(block: nn.Module) -> list[tuple[ResnetBlock2D, Transformer2DModel | None]]:
    """Return the ResNet blocks of a down or up block, each with the transformer that follows it, if any."""
    return list(zip_longest(cast(Sequence[ResnetBlock2D], block.resnets), getattr(block, "attentions", ())))


def count_parts(following: nn.Module, channels: int) -> int:
    """Return the number of maps that an upsampled map's channels are split into.

    Maps with as many channels as the result of the block that reads them can be overwritten by it.
    """
    out_channels = cast(Sequence[ResnetBlock2D], following.resnets)[0].out_channels
    return channels // out_channels if channels % out_channels == 0 else 1
