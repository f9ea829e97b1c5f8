"""Check that a UNet or ControlNet can run in strips. Unsupported networks are rejected when they are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from linfusion_cli.core.errors import DataError
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions
from linfusion_cli.unet.walk import Network

BLOCKS = {
    "down_blocks": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "up_blocks": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
LAYERS = ("ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D")
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0")
HINT = "Use --attention original to run the model without strips."
CONTROLNET_HINT = "Leave phases with linear attention out of --control-phases, or use another ControlNet."


def check_supported(unet: UNet2DConditionModel) -> None:
    """Raise DataError with the first part of `unet` that the executor does not support."""
    for path, reason in (*find_unsupported_parts(unet), *find_non_linear_attention(unet)):
        raise DataError(f"The UNet cannot run in strips: {path} is {reason}.", HINT)


def check_controlnet(net: ControlNetModel | ControlNetUnionModel) -> None:
    """Raise DataError with the first part of a ControlNet that the executor does not support."""
    for path, reason in (*find_unsupported_parts(net), *find_non_linear_attention(net)):
        raise DataError(f"The ControlNet cannot run in strips: {path} is {reason}.", CONTROLNET_HINT)


def find_non_linear_attention(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (path, description) of every self-attention that is not linear."""
    for path, module in find_self_attentions(network).items():
        if not isinstance(module, LinearAttention):
            yield path, f"a {type(module).__name__}, which attends to all tokens at once"


def find_unsupported_parts(network: Network) -> Iterator[tuple[str, str]]:
    """Yield (path, description) of every unsupported part of a UNet or ControlNet, except self-attention."""
    config: Any = network.config  # a FrozenDict, which has attributes too
    if config.addition_embed_type not in (None, "text_time") or config.get("center_input_sample"):
        yield "its input", "conditioned in an unsupported way"
    projects_text = network.encoder_hid_proj is not None and config.encoder_hid_dim_type != "ip_image_proj"
    # An IP-Adapter moves a text projection from encoder_hid_proj to this attribute.
    projects_text |= getattr(network, "text_encoder_hid_proj", None) is not None
    if network.class_embedding is not None or projects_text:
        yield "its conditioning", "of an unsupported type (class embedding or projected text)"
    for kind, known in BLOCKS.items():
        blocks = getattr(network, kind, None)  # a ControlNet has no up blocks
        for i, block in enumerate(blocks if isinstance(blocks, nn.ModuleList) else [blocks]):
            path = f"{kind}.{i}" if isinstance(blocks, nn.ModuleList) else kind
            if block is not None and type(block).__name__ not in known:
                yield path, f"a {type(block).__name__}"
            elif block is not None:
                yield from find_unsupported_layers(path, block)


def find_unsupported_layers(path: str, block: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (path, description) of every unsupported layer of a block."""
    if getattr(block, "s1", None):
        yield path, "modified by FreeU"
    for kind in ("resnets", "attentions", "downsamplers", "upsamplers"):
        for i, layer in enumerate(getattr(block, kind, None) or ()):
            layer_path = f"{path}.{kind}.{i}"
            if layer is not None and type(layer).__name__ not in LAYERS:
                yield layer_path, f"a {type(layer).__name__}"
            elif layer is not None and (reason := LAYER_CHECKS[type(layer).__name__](layer)):
                yield layer_path, reason


def check_resnet(block: ResnetBlock2D) -> str | None:
    """Return the reason why a ResNet block is unsupported, or None."""
    if block.upsample is not None or block.downsample is not None:
        return "a ResNet block that resamples"
    if block.time_emb_proj is None or block.time_embedding_norm != "default" or block.skip_time_act:
        return f"a ResNet block with time_embedding_norm {block.time_embedding_norm!r}"
    return None if block.output_scale_factor == 1 else f"a ResNet block scaled by {block.output_scale_factor}"


def check_transformer(transformer: Transformer2DModel) -> str | None:
    """Return the reason why a transformer is unsupported, or None."""
    for block in cast(Sequence[BasicTransformerBlock], transformer.transformer_blocks):
        if block.norm_type != "layer_norm" or block.only_cross_attention or block.pos_embed is not None:
            return f"a transformer with norm_type {block.norm_type!r}"
        if block.attn2 is None or type(block.attn2.processor).__name__ not in PROCESSORS:
            return "a transformer with a custom cross-attention processor"
    return None


def check_downsampler(downsampler: Downsample2D) -> str | None:
    """Return the reason why a downsampler is unsupported, or None."""
    return None if downsampler.use_conv and downsampler.padding == 1 else "an unsupported downsampler"


def check_upsampler(upsampler: Upsample2D) -> str | None:
    """Return the reason why an upsampler is unsupported, or None."""
    is_supported = upsampler.use_conv and not upsampler.use_conv_transpose and upsampler.interpolate
    return None if is_supported and upsampler.norm is None else "an unsupported upsampler"


LAYER_CHECKS = dict(zip(LAYERS, (check_resnet, check_transformer, check_downsampler, check_upsampler), strict=True))
