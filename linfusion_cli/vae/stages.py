"""The stages of a VAE's two networks, in order: what a stream of rows goes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from linfusion_cli.core.errors import DataError
from linfusion_cli.strips.stream import Add, Convolution, Edges, FrozenNorm, Pointwise, ResidualBuffer, StreamStage
from linfusion_cli.vae.attention import FixedAttention

Vae = AutoencoderKL | AutoencoderTiny
OTHER_VAE = "Name another with --vae."


def decoder_stages(vae: Vae) -> list[StreamStage]:
    """Latents [B, n, w, C] as the UNet knows them -> pixels [B, 8n, 8w, 3], 0 to 1 but for some; raises DataError."""
    if isinstance(vae, AutoencoderTiny):
        return [Pointwise(squashed), *sequence(vae.decoder.layers)]
    decoder, scale = vae.decoder, vae.config.scaling_factor
    found: list[StreamStage] = [Pointwise(lambda rows: rows / scale)]
    if vae.post_quant_conv is not None:
        found.append(Convolution(vae.post_quant_conv))
    found += [Convolution(decoder.conv_in), *middle(decoder.mid_block)]
    for i, block in enumerate(decoder.up_blocks):
        found += resnets(block, f"decoder.up_blocks.{i}")
        found += [upsample(layer) for layer in block.upsamplers or ()]
    return [*found, convolution_out(decoder), Pointwise(lambda rows: rows.div_(2).add_(0.5))]


def encoder_stages(vae: Vae) -> list[StreamStage]:
    """Pixels 0 to 1 -> mean and logarithm of the variance of unscaled latents, side by side; raises DataError.

    A tiny VAE gives the latents alone.
    """
    if isinstance(vae, AutoencoderTiny):
        return list(sequence(vae.encoder.layers))
    encoder = vae.encoder
    found: list[StreamStage] = [Pointwise(lambda rows: rows * 2 - 1), Convolution(encoder.conv_in)]
    for i, block in enumerate(encoder.down_blocks):
        found += resnets(block, f"encoder.down_blocks.{i}")
        found += [downsample(layer) for layer in block.downsamplers or ()]
    found += [*middle(encoder.mid_block), convolution_out(encoder)]
    return found if vae.quant_conv is None else [*found, Convolution(vae.quant_conv)]


def squashed(latents: Tensor) -> Tensor:
    """What a tiny decoder does to latents that lie far out."""
    return torch.tanh(latents / 3) * 3


def middle(block: nn.Module) -> Iterator[StreamStage]:
    """A ResNet block, then pairs of attention, which may be missing, and ResNet block."""
    attentions = list(block.attentions or ()) or [None] * (len(block.resnets) - 1)
    yield from resnet(block.resnets[0], "mid_block.resnets.0")
    for i, (attention, following) in enumerate(zip(attentions, block.resnets[1:], strict=True), 1):
        if attention is not None:
            yield attended(attention)
        yield from resnet(following, f"mid_block.resnets.{i}")


def resnets(block: nn.Module, name: str) -> Iterator[StreamStage]:
    """The ResNet blocks of one level."""
    if getattr(block, "attentions", None):
        raise unknown(f"{name}.attentions")
    for i, layer in enumerate(block.resnets):
        yield from resnet(layer, f"{name}.resnets.{i}")


def resnet(block: nn.Module, name: str) -> list[StreamStage]:
    """A ResNet block: two convolutions, each of a normalised map, and a shortcut past both."""
    plain = isinstance(block, ResnetBlock2D) and block.time_emb_proj is None
    if not plain or block.upsample is not None or block.downsample is not None:
        raise unknown(name)
    kept, activation = ResidualBuffer(), block.nonlinearity
    first = Convolution(block.conv1, FrozenNorm(block.norm1, activation), keeps=kept)
    second = Convolution(block.conv2, FrozenNorm(block.norm2, activation))
    return [first, second, Add(kept, block.conv_shortcut, block.output_scale_factor)]


def attended(attention: Attention) -> StreamStage:
    """The self-attention of the middle."""
    rare = attention.group_norm is None or attention.spatial_norm is not None
    if rare or attention.norm_q is not None or attention.norm_k is not None:
        raise unknown("mid_block.attentions")
    return FixedAttention(attention)


def upsample(layer: Upsample2D) -> StreamStage:
    """Each pixel becomes four, then a convolution."""
    if not layer.use_conv or layer.use_conv_transpose or layer.norm is not None:
        raise unknown("decoder upsampler")
    return Convolution(layer.conv, doubled=True)


def downsample(layer: Downsample2D) -> StreamStage:
    """A convolution that takes two steps at a time; without padding of its own, it has zeros below and to the right."""
    if not layer.use_conv or layer.norm is not None:
        raise unknown("encoder downsampler")
    return Convolution(layer.conv, edges=None if layer.padding else Edges(top=0, bottom=1, right=1))


def convolution_out(network: nn.Module) -> StreamStage:
    """The last convolution, of a normalised map."""
    if not isinstance(network.conv_norm_out, nn.GroupNorm):
        raise unknown("conv_norm_out")
    return Convolution(network.conv_out, FrozenNorm(network.conv_norm_out, network.conv_act))


def sequence(layers: Sequence[nn.Module]) -> Iterator[StreamStage]:
    """The layers of a tiny VAE's network: it has no normalisation, and nothing else that looks far."""
    doubled = False
    for layer in layers:
        if isinstance(layer, nn.Upsample):
            doubled = True
        elif isinstance(layer, nn.Conv2d):
            yield Convolution(layer, doubled=doubled)
            doubled = False
        elif isinstance(layer, AutoencoderTinyBlock):
            yield from tiny_block(layer)
        else:
            yield Pointwise(layer)


def tiny_block(block: AutoencoderTinyBlock) -> Iterator[StreamStage]:
    """Three convolutions and a shortcut past them."""
    kept = ResidualBuffer()
    for i, layer in enumerate(block.conv):
        yield Convolution(layer, keeps=None if i else kept) if isinstance(layer, nn.Conv2d) else Pointwise(layer)
    yield Add(kept, None if isinstance(block.skip, nn.Identity) else block.skip)
    yield Pointwise(block.fuse)


def unknown(name: str) -> DataError:
    return DataError(f"The VAE has a part of a kind that is not supported: {name}.", OTHER_VAE)
