"""Random networks with SDXL's architecture, for benchmarks and tests that must not download anything."""

import math

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions
from linfusion_cli.models.families.facts import read_config
from linfusion_cli.models.locate.published import get_configs
from linfusion_cli.unet.forward import UNetInputs

TEXT_TOKENS, POOLED = 77, 1280
SDXL_KEYS = 16384  # latent pixels in the attention of SDXL's VAE at its native 1024 px
MID_DIVISOR = 16  # channels / `projection_mid_dim` in f_q and f_k of the published LinFusion-XL


def build_sdxl_unet(divisor: int = 1) -> UNet2DConditionModel:
    """Build SDXL's UNet with its channels divided by `divisor`; heads keep 64 channels."""
    config = read_config(get_configs("sdxl") / "unet" / "config.json")
    widths = [width // divisor for width in config["block_out_channels"]]
    narrow = {"block_out_channels": widths, "attention_head_dim": [max(1, width // 64) for width in widths]}
    narrow |= {"cross_attention_dim": config["cross_attention_dim"] // divisor}
    return UNet2DConditionModel.from_config(config | narrow)


def build_linear_attentions(unet: UNet2DConditionModel) -> dict[str, LinearAttention]:
    """Build random linear attention for each self-attention of `unet`, shaped as in the published LinFusion-XL."""
    modules = find_self_attentions(unet).items()
    return {path: build_linear_attention(module.to_q.in_features, module.heads) for path, module in modules}


def build_linear_attention(dim: int, heads: int) -> LinearAttention:
    """Build linear attention for `dim` channels, with a hidden size of at least 1 even in a narrow UNet."""
    return LinearAttention(dim, heads, mid_dim=max(1, dim // MID_DIVISOR))


def build_random_inputs(unet: UNet2DConditionModel) -> UNetInputs:
    """Build a random text embedding and size conditioning with the device and dtype of `unet`."""
    where = {"device": unet.device, "dtype": unet.dtype}
    added = {"text_embeds": torch.randn(1, POOLED, **where), "time_ids": torch.full((1, 6), 1024.0, **where)}
    return UNetInputs(torch.randn(1, TEXT_TOKENS, unet.config.cross_attention_dim, **where), added)


def build_sdxl_vae(divisor: int = 1) -> AutoencoderKL:
    """Build SDXL's VAE with its channels divided by `divisor`; norms have 32 groups if the channels allow it."""
    config = read_config(get_configs("sdxl") / "vae" / "config.json")
    widths = [width // divisor for width in config["block_out_channels"]]
    groups = config["norm_num_groups"] if divisor == 1 else math.gcd(*widths)
    return AutoencoderKL.from_config(config | {"block_out_channels": widths, "norm_num_groups": groups})
