"""Small random models of the real classes in the real formats."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions
from linfusion_cli.mixers.linear.weights import save_weights

TEXT_WIDTH = 16
PROJECTION = 16


def list_byte_characters() -> list[str]:
    """Return the 256 characters that encode bytes in CLIP's vocabulary (byte-level BPE of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def write_small_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a tokenizer of single bytes, which can tokenize every text."""
    letters = list_byte_characters()
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def build_small_text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        projection_dim=PROJECTION,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=512,
        eos_token_id=513,
    )


def build_small_vae(
    widths: tuple[int, int, int, int] = (8, 8, 8, 8), layers_per_block: int = 1, groups: int = 4
) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=layers_per_block,
        latent_channels=4,
        norm_num_groups=groups,
        sample_size=128,
        scaling_factor=0.13,
    )


def build_small_xl_unet(
    transformer_layers: tuple[int, int, int] = (1, 1, 2), heads: tuple[int, int, int] = (1, 2, 2), **more: object
) -> UNet2DConditionModel:
    """Build a UNet with SDXL's three levels, linear projections and text_time conditioning; native size 64 px."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=transformer_layers,
        attention_head_dim=heads,
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=PROJECTION + 6 * 8,
        norm_num_groups=4,
        **more,
    )


def build_small_sd_unet() -> UNet2DConditionModel:
    """Build a UNet with SD 1.5's four levels and convolutional projections; native size 64 px."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=4,
    )


def build_small_scheduler(**more: object) -> EulerDiscreteScheduler:
    """Build an Euler scheduler with SDXL's betas."""
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        timestep_spacing="leading",
        **more,
    )


def build_scheduler_config() -> dict[str, object]:
    """Return its scheduler_config.json; the config of the object marks default values, which cannot be overridden."""
    return json.loads(build_small_scheduler().to_json_string())


def write_small_xl(folder: Path, **save_options: object) -> Path:
    """Write a random SDXL model in diffusers' folder layout, with LinFusion weights."""
    torch.manual_seed(0)
    config = build_small_text_config()
    unet = build_small_xl_unet()
    StableDiffusionXLPipeline(
        vae=build_small_vae(),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=write_small_tokenizer(folder / "tokenizer"),
        tokenizer_2=write_small_tokenizer(folder / "tokenizer_2"),
        unet=unet,
        scheduler=build_small_scheduler(),
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder, **save_options)
    write_linfusion(folder / "linfusion", unet)
    return folder


def write_small_sd(folder: Path, **scheduler_options: object) -> Path:
    """Write a random SD 1.5 model in diffusers' folder layout."""
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=build_small_vae(),
        text_encoder=CLIPTextModel(build_small_text_config()),
        tokenizer=write_small_tokenizer(folder / "tokenizer"),
        unet=build_small_sd_unet(),
        scheduler=build_small_scheduler(**scheduler_options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_linfusion(folder: Path, unet: UNet2DConditionModel) -> Path:
    """Write random LinFusion weights for `unet` in the published layout."""
    modules = {
        path: LinearAttention(module.to_q.in_features, module.heads)
        for path, module in find_self_attentions(unet).items()
    }
    save_weights(folder, modules, torch.float32)
    return folder
