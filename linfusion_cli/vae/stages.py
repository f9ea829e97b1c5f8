"""Convert the encoder and decoder of a VAE to lists of stream stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock, Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from linfusion_cli.core.errors import DataError
from linfusion_cli.strips.stream import Add, Convolution, Edges, FrozenNorm, Pointwise, ResidualBuffer, StreamStage
from linfusion_cli.vae.attention import FixedAttention

Vae = AutoencoderKL | AutoencoderTiny
OTHER_VAE_HINT = "Use another one with --vae."


def build_decoder_stages(vae: Vae) -> list[StreamStage]:
    """Return the stages from scaled latents [B, n, w, C] to pixels [B, 8n, 8w, 3]; pixels are not clamped to [0, 1].

    Raise DataError for an unsupported part.
    """
    if isinstance(vae, AutoencoderTiny):
        return [Pointwise(squash_latents), *build_tiny_stages(vae.decoder.layers)]
    decoder, scale = vae.decoder, vae.config["scaling_factor"]
    stages: list[StreamStage] = [Pointwise(lambda rows: rows / scale)]
    if vae.post_quant_conv is not None:
        stages.append(Convolution(vae.post_quant_conv))
    stages += [Convolution(decoder.conv_in), *build_middle(decoder.mid_block)]
    for i, block in enumerate(cast(Iterable[UpDecoderBlock2D], decoder.up_blocks)):
        stages += build_resnets(block, f"decoder.up_blocks.{i}")
        stages += [build_upsample(cast(Upsample2D, layer)) for layer in block.upsamplers or ()]
    return [*stages, build_output_convolution(decoder), Pointwise(lambda rows: rows.div_(2).add_(0.5))]


def build_encoder_stages(vae: Vae) -> list[StreamStage]:
    """Return the stages from pixels in [0, 1] to the mean and log variance of unscaled latents, 2C channels.

    A tiny VAE returns the latents, C channels. Raise DataError for an unsupported part.
    """
    if isinstance(vae, AutoencoderTiny):
        return list(build_tiny_stages(vae.encoder.layers))
    encoder = vae.encoder
    stages: list[StreamStage] = [Pointwise(lambda rows: rows * 2 - 1), Convolution(encoder.conv_in)]
    for i, block in enumerate(cast(Iterable[DownEncoderBlock2D], encoder.down_blocks)):
        stages += build_resnets(block, f"encoder.down_blocks.{i}")
        stages += [build_downsample(cast(Downsample2D, layer)) for layer in block.downsamplers or ()]
    stages += [*build_middle(encoder.mid_block), build_output_convolution(encoder)]
    return stages if vae.quant_conv is None else [*stages, Convolution(vae.quant_conv)]


def squash_latents(latents: Tensor) -> Tensor:
    """Limit latents to (-3, 3), as the tiny decoder does."""
    return torch.tanh(latents / 3) * 3


def build_middle(block: UNetMidBlock2D) -> Iterator[StreamStage]:
    """Yield the stages of the middle block: a ResNet block, then pairs of attention (optional) and ResNet block."""
    attentions = [*(block.attentions or ())] or [None] * (len(block.resnets) - 1)
    yield from build_resnet(block.resnets[0], "mid_block.resnets.0")
    for i, (attention, following) in enumerate(zip(attentions, [*block.resnets][1:], strict=True), 1):
        if attention is not None:
            yield build_attention(cast(Attention, attention))
        yield from build_resnet(following, f"mid_block.resnets.{i}")


def build_resnets(block: UpDecoderBlock2D | DownEncoderBlock2D, name: str) -> Iterator[StreamStage]:
    """Yield the stages of the ResNet blocks of one level. `name` is the path of `block`, for errors."""
    if getattr(block, "attentions", None):
        raise build_unsupported_error(f"{name}.attentions")
    for i, layer in enumerate(block.resnets):
        yield from build_resnet(layer, f"{name}.resnets.{i}")


def build_resnet(block: nn.Module, name: str) -> list[StreamStage]:
    """Return the stages of a ResNet block: two convolutions with GroupNorm, and a shortcut past both."""
    if not isinstance(block, ResnetBlock2D) or block.time_emb_proj is not None:
        raise build_unsupported_error(name)
    if block.upsample is not None or block.downsample is not None:
        raise build_unsupported_error(name)
    shortcut, activation = ResidualBuffer(), block.nonlinearity
    first = Convolution(block.conv1, FrozenNorm(block.norm1, activation), residual=shortcut)
    second = Convolution(block.conv2, FrozenNorm(block.norm2, activation))
    return [first, second, Add(shortcut, block.conv_shortcut, block.output_scale_factor)]


def build_attention(attention: Attention) -> StreamStage:
    """Return the stage of the middle block's self-attention."""
    is_unusual = attention.group_norm is None or attention.spatial_norm is not None
    if is_unusual or attention.norm_q is not None or attention.norm_k is not None:
        raise build_unsupported_error("mid_block.attentions")
    return FixedAttention(attention)


def build_upsample(layer: Upsample2D) -> StreamStage:
    """Return the stage of a nearest-neighbour upsampling by 2 with a convolution."""
    if not layer.use_conv or layer.use_conv_transpose or layer.norm is not None:
        raise build_unsupported_error("decoder upsampler")
    return Convolution(cast(nn.Conv2d, layer.conv), upscale=True)


def build_downsample(layer: Downsample2D) -> StreamStage:
    """Return the stage of a convolution with stride 2. If it has no padding, zeros are added below and to the right."""
    if not layer.use_conv or layer.norm is not None:
        raise build_unsupported_error("encoder downsampler")
    return Convolution(layer.conv, edges=None if layer.padding else Edges(top=0, bottom=1, right=1))


def build_output_convolution(network: Encoder | Decoder) -> StreamStage:
    """Return the stage of the output GroupNorm and convolution."""
    if not isinstance(network.conv_norm_out, nn.GroupNorm):
        raise build_unsupported_error("conv_norm_out")
    return Convolution(network.conv_out, FrozenNorm(network.conv_norm_out, network.conv_act))


def build_tiny_stages(layers: Iterable[nn.Module]) -> Iterator[StreamStage]:
    """Yield the stages of a tiny VAE's network, which has neither normalisation nor attention."""
    upscale = False
    for layer in layers:
        if isinstance(layer, nn.Upsample):
            upscale = True
        elif isinstance(layer, nn.Conv2d):
            yield Convolution(layer, upscale=upscale)
            upscale = False
        elif isinstance(layer, AutoencoderTinyBlock):
            yield from build_tiny_block(layer)
        else:
            yield Pointwise(layer)


def build_tiny_block(block: AutoencoderTinyBlock) -> Iterator[StreamStage]:
    """Yield the stages of a tiny VAE's block: three convolutions and a shortcut past them."""
    shortcut = ResidualBuffer()
    for i, layer in enumerate(block.conv):
        yield Convolution(layer, residual=None if i else shortcut) if isinstance(layer, nn.Conv2d) else Pointwise(layer)
    yield Add(shortcut, None if isinstance(block.skip, nn.Identity) else block.skip)
    yield Pointwise(block.fuse)


def build_unsupported_error(name: str) -> DataError:
    """Return the error for the unsupported part `name`."""
    return DataError(f"The VAE has an unsupported part: {name}.", OTHER_VAE_HINT)
