"""Which UNets can run in strips: everything else is refused by name, when it is mounted."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from torch import nn

from linfusion_cli.core.errors import DataError
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import self_attentions

BLOCKS = {
    "down_blocks": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "up_blocks": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
LAYERS = ("ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D")
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0")
WAY_OUT = "Use --attention original, which runs the model whole."
WAY_OUT_OF_CONTROL = "Leave phases with linear attention out of --control-phases, or use another ControlNet."


def check_supported(unet: UNet2DConditionModel) -> None:
    """Raise DataError naming the first part of `unet` that the executor does not know, or knows otherwise."""
    for path, what in (*unknown_parts(unet), *unmounted(unet)):
        raise DataError(f"The UNet cannot run in strips: {path} is {what}.", WAY_OUT)


def check_control(net: ControlNetModel | ControlNetUnionModel) -> None:
    """As `check_supported`, for a ControlNet."""
    for path, what in (*unknown_parts(net), *unmounted(net)):
        raise DataError(f"The ControlNet cannot run in strips: {path} is {what}.", WAY_OUT_OF_CONTROL)


def unmounted(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, what it is) of every self-attention that is not linear."""
    for path, module in self_attentions(unet).items():
        if not isinstance(module, LinearAttention):
            yield path, f"a {type(module).__name__}, which sees all tokens at once"


def unknown_parts(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, what it is) of every part of a UNet or ControlNet that the executor does not know, but self-attention."""
    config = unet.config
    if config.addition_embed_type not in (None, "text_time") or config.get("center_input_sample"):
        yield "its input", "conditioned in an unknown way"
    projects_text = unet.encoder_hid_proj is not None and config.encoder_hid_dim_type != "ip_image_proj"
    projects_text |= getattr(unet, "text_encoder_hid_proj", None) is not None  # where an IP-Adapter took its place
    if unet.class_embedding is not None or projects_text:
        yield "its conditioning", "of an unknown kind (class embedding or projected text)"
    for kind, known in BLOCKS.items():
        blocks = getattr(unet, kind, None)  # a ControlNet has none on the way up
        for i, block in enumerate(blocks if isinstance(blocks, nn.ModuleList) else [blocks]):
            path = f"{kind}.{i}" if isinstance(blocks, nn.ModuleList) else kind
            if block is not None and type(block).__name__ not in known:
                yield path, f"a {type(block).__name__}"
            elif block is not None:
                yield from unknown_layers(path, block)


def unknown_layers(path: str, block: nn.Module) -> Iterator[tuple[str, str]]:
    """As `unknown_parts`, within one block."""
    if getattr(block, "s1", None):
        yield path, "under FreeU"
    for kind in ("resnets", "attentions", "downsamplers", "upsamplers"):
        for i, layer in enumerate(getattr(block, kind, None) or ()):
            place = f"{path}.{kind}.{i}"
            if layer is not None and type(layer).__name__ not in LAYERS:
                yield place, f"a {type(layer).__name__}"
            elif layer is not None and (oddity := ODDITIES[type(layer).__name__](layer)):
                yield place, oddity


def odd_resnet(block: nn.Module) -> str | None:
    if block.upsample is not None or block.downsample is not None:
        return "a ResNet block that resamples"
    if block.time_emb_proj is None or block.time_embedding_norm != "default" or block.skip_time_act:
        return f"a ResNet block with time_embedding_norm {block.time_embedding_norm!r}"
    return None if block.output_scale_factor == 1 else f"a ResNet block scaled by {block.output_scale_factor}"


def odd_transformer(transformer: nn.Module) -> str | None:
    for block in transformer.transformer_blocks:
        if block.norm_type != "layer_norm" or block.only_cross_attention or block.pos_embed is not None:
            return f"a transformer with norm_type {block.norm_type!r}"
        if block.attn2 is None or type(block.attn2.processor).__name__ not in PROCESSORS:
            return "a transformer whose cross-attention has a processor of its own"
    return None


def odd_downsample(downsampler: nn.Module) -> str | None:
    return None if downsampler.use_conv and downsampler.padding == 1 else "a downsampler of an unknown kind"


def odd_upsample(upsampler: nn.Module) -> str | None:
    known = upsampler.use_conv and not upsampler.use_conv_transpose and upsampler.interpolate
    return None if known and upsampler.norm is None else "an upsampler of an unknown kind"


ODDITIES = dict(zip(LAYERS, (odd_resnet, odd_transformer, odd_downsample, odd_upsample), strict=True))
