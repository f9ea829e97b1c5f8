"""Write small models as single files in the layout of the original code, with its tensor names."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from linfusion_cli.models.adapters.lora import list_original_names
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.load.networks import load_meta
from tests.support.small_models import (
    build_small_sd_unet,
    build_small_text_config,
    build_small_vae,
    write_small_tokenizer,
)

UNET_PLACES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def replace_all(name: str, words: dict[str, str]) -> str:
    for word, other in words.items():
        name = name.replace(word, other)
    return name


def to_original_unet(unet: UNet2DConditionModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a UNet, with the prefix "model.diffusion_model."."""
    places = {path: place for place, path in list_original_names(unet)} | UNET_PLACES
    found = {}
    for name, tensor in state.items():
        path = next(path for path in sorted(places, key=len, reverse=True) if name.startswith(f"{path}."))
        rest = name.removeprefix(f"{path}.")
        rest = replace_all(rest, RESNET) if "resnets" in path else rest
        found[f"model.diffusion_model.{places[path]}.{rest}"] = tensor
    return found


def to_original_vae(
    vae: AutoencoderKL, state: dict[str, Tensor], prefix: str = "first_stage_model."
) -> dict[str, Tensor]:
    """Rename the tensors of a VAE; the original has 1x1 convolutions in attention and reversed decoder blocks."""
    last = len(vae.config.block_out_channels) - 1
    words = {"conv_norm_out": "norm_out", "mid_block.attentions.0": "mid.attn_1", "conv_shortcut": "nin_shortcut"}
    words |= {f"mid_block.resnets.{i}": f"mid.block_{i + 1}" for i in (0, 1)}
    words |= {f"down_blocks.{i}.resnets": f"down.{i}.block" for i in range(last + 1)}
    words |= {f"down_blocks.{i}.downsamplers.0": f"down.{i}.downsample" for i in range(last + 1)}
    words |= {f"up_blocks.{i}.resnets": f"up.{last - i}.block" for i in range(last + 1)}
    words |= {f"up_blocks.{i}.upsamplers.0": f"up.{last - i}.upsample" for i in range(last + 1)}
    found = {}
    for name, tensor in state.items():
        new = replace_all(name, words)
        if "attn_1" in new:
            new = replace_all(new, VAE_ATTENTION)
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        found[prefix + new] = tensor
    return found


def to_original_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename the tensors of a CLIP encoder, and add the integer tensor of real files."""
    found = {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}
    return found | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def to_original_open_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename the tensors of an OpenCLIP encoder; there q, k, v are one matrix and the projection is transposed."""
    found = {}
    for name, tensor in state.items():
        new = replace_all(name.removeprefix("text_model."), OPEN_CLIP)
        if name == "text_projection.weight":
            found[f"{prefix}text_projection"] = tensor.T
        elif ".q_proj." in new:
            parts = [state[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            found[prefix + replace_all(new, {"q_proj.weight": "in_proj_weight", "q_proj.bias": "in_proj_bias"})] = (
                torch.cat(parts)
            )
        elif ".k_proj." not in new and ".v_proj." not in new:
            found[prefix + new] = tensor
    return found


def load_part_state(folder: Path, part: str) -> dict[str, Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def write_original(folder: Path, file: Path, family: str, notes: dict[str, str] | None = None) -> Path:
    """Write the model in diffusers' `folder` as a single original file."""
    unet = load_meta(UNet2DConditionModel, Model(folder).get_part("unet"))
    vae = load_meta(AutoencoderKL, Model(folder).get_part("vae"))
    tensors = to_original_unet(unet, load_part_state(folder, "unet")) | to_original_vae(
        vae, load_part_state(folder, "vae")
    )
    first = load_part_state(folder, "text_encoder")
    if family == "sdxl":
        tensors |= to_original_clip(first, "conditioner.embedders.0.transformer.")
        second = load_part_state(folder, "text_encoder_2")
        tensors |= to_original_open_clip(second, "conditioner.embedders.1.model.")
    elif family == "sd21":
        tensors |= to_original_open_clip(first, "cond_stage_model.model.")
    else:
        tensors |= to_original_clip(first, "cond_stage_model.transformer.")
    tensors |= {"model_ema.num_updates": torch.tensor(3)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, notes)
    return file


def write_small_sd21(folder: Path, **scheduler_options: object) -> Path:
    """Write a random SD 2.1 model: linear projections, GELU in the text encoder, v-prediction."""
    torch.manual_seed(0)
    config = build_small_text_config()
    config.hidden_act = "gelu"
    unet = UNet2DConditionModel.from_config(
        {
            **without_default_marks(build_small_sd_unet().config),
            "use_linear_projection": True,
            "attention_head_dim": (1, 1, 2, 2),
        }
    )
    StableDiffusionPipeline(
        vae=build_small_vae(),
        text_encoder=CLIPTextModel(config),
        tokenizer=write_small_tokenizer(folder / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **scheduler_options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def without_default_marks(config: dict) -> dict:
    """Remove the marks of default values from a config."""
    return {name: value for name, value in config.items() if name != "_use_default_values"}


def copy_without_weights(folder: Path, target: Path) -> Path:
    """Copy only the configs and tokenizers of a model, like `linfusion models pull --configs`."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "linfusion")))
