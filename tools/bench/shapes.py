"""Random networks of SDXL's shape for benchmarks: every layer is there, and nothing is downloaded."""

import math

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions
from linfusion_cli.unet.forward import UNetInputs

TEXT_TOKENS, POOLED = 77, 1280
SDXL_KEYS = 16384  # pixels that the attention in its VAE was trained to see: 1024 px
MID_DIVISOR = 16  # f_q and f_k of the published LinFusion-XL: `projection_mid_dim` is a sixteenth of the channels


def sdxl_unet(divisor: int = 1) -> UNet2DConditionModel:
    """SDXL's UNet with its channels divided by `divisor`, heads of 64 as they are."""
    widths = tuple(width // divisor for width in (320, 640, 1280))
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=tuple(max(1, width // 64) for width in widths),
        cross_attention_dim=2048 // divisor,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=POOLED + 6 * 256,
    )


def linear_attentions(unet: UNet2DConditionModel) -> dict[str, LinearAttention]:
    """Random linear attention for every self-attention of `unet`, in the shapes of the published LinFusion-XL."""
    modules = find_self_attentions(unet).items()
    return {path: linear_attention(module.to_q.in_features, module.heads) for path, module in modules}


def linear_attention(dim: int, heads: int) -> LinearAttention:
    """For `dim` channels, which are too few to be divided where the UNet is narrow."""
    return LinearAttention(dim, heads, mid_dim=max(1, dim // MID_DIVISOR))


def random_condition(unet: UNet2DConditionModel) -> UNetInputs:
    """A text and sizes, on the UNet's device and in its dtype."""
    where = {"device": unet.device, "dtype": unet.dtype}
    added = {"text_embeds": torch.randn(1, POOLED, **where), "time_ids": torch.full((1, 6), 1024.0, **where)}
    return UNetInputs(torch.randn(1, TEXT_TOKENS, unet.config.cross_attention_dim, **where), added)


def sdxl_vae(divisor: int = 1) -> AutoencoderKL:
    """SDXL's VAE with its channels divided by `divisor`, in 32 groups or as many as that leaves."""
    widths = tuple(width // divisor for width in (128, 256, 512, 512))
    return AutoencoderKL(
        block_out_channels=widths,
        norm_num_groups=32 if divisor == 1 else math.gcd(*widths),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
    )
