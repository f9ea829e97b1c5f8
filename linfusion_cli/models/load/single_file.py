"""Single files in the layout of the original Stable Diffusion and SDXL code, converted to the names of diffusers.

The conversion functions are those of diffusers (`loaders/single_file_utils.py`). They take dictionaries, so a file can
be read network by network, and a header can be checked with tensors on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from linfusion_cli.core.errors import DataError
from linfusion_cli.models.families.compatibility import UNET_PREFIX
from linfusion_cli.models.families.facts import VAE_PREFIX
from linfusion_cli.models.files.header import Header

CLIP_PREFIXES = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
SD21_OPEN_CLIP_PREFIX = "cond_stage_model.model."  # the text encoder of SD 2.1
SDXL_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."  # the second text encoder of SDXL
SCALE_SUFFIXES = ("scale_weight", "scale_input", "scaled_fp8")
INPUT_BLOCK, OUTPUT_BLOCK = "input_blocks.{}.1.", "output_blocks.{}.1."

Convert = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


def convert_unet(unet: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensor names of a UNet."""
    return convert_ldm_unet_checkpoint(tensors, unet.config)


def convert_vae(vae: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensor names of a VAE."""
    return convert_ldm_vae_checkpoint(tensors, vae.config)


def convert_clip(encoder: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensor names of a CLIP text encoder."""
    return convert_ldm_clip_checkpoint(tensors)


def build_open_clip_converter(prefix: str) -> Convert:
    """Return a function that converts an OpenCLIP encoder; it transposes the text projection of SDXL."""
    return lambda encoder, tensors: convert_open_clip_checkpoint(encoder, tensors, prefix=prefix)


# Class of the network -> possible prefixes in a single file, and the function that converts its tensors.
CONVERTERS: dict[type, dict[str, Convert]] = {
    UNet2DConditionModel: {UNET_PREFIX: convert_unet},
    AutoencoderKL: {VAE_PREFIX: convert_vae},
    CLIPTextModel: {prefix: convert_clip for prefix in CLIP_PREFIXES}
    | {SD21_OPEN_CLIP_PREFIX: build_open_clip_converter(SD21_OPEN_CLIP_PREFIX)},
    CLIPTextModelWithProjection: {SDXL_OPEN_CLIP_PREFIX: build_open_clip_converter(SDXL_OPEN_CLIP_PREFIX)},
}


def read_state_dict(header: Header, module: nn.Module, on_meta: bool = False) -> dict[str, Tensor]:
    """Read the tensors of `module` from a single file, with the names of diffusers; on the meta device if `on_meta`.

    Raise DataError if the file does not contain this network, or if its tensors cannot be converted.
    """
    prefix, convert = find_converter(header, type(module))
    header.check_dtypes(prefix)
    reject_scaled_weights(header, prefix)
    tensors = read_tensors(header, prefix, on_meta)
    if prefix == "" and module.state_dict().keys() <= tensors.keys():
        return tensors  # the file has the names of diffusers
    try:
        return convert(module, tensors)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise DataError(f"{header.file} does not fit its model family ({error!r}).", "Use another file.") from error


def reject_scaled_weights(header: Header, prefix: str) -> None:
    """Raise DataError for fp8 weights with separate scales: without the scales their values are wrong."""
    if scale := next(
        (name for name in header.shapes if name.startswith(prefix) and name.endswith(SCALE_SUFFIXES)), None
    ):
        reason = f"{header.file} has scaled weights ({scale}), which are not supported."
        raise DataError(reason, "Use a file in fp32, fp16 or bf16.")


def find_converter(header: Header, kind: type) -> tuple[str, Convert]:
    """Return prefix and conversion function of a network in a single file; raise DataError if it is not in the file.

    The prefix can be empty in a file that contains only a VAE.
    """
    converters = CONVERTERS.get(kind, {})
    for prefix, convert in converters.items():
        if any(name.startswith(prefix) for name in header.shapes):
            return prefix, convert
    if kind is AutoencoderKL and any(name.startswith("decoder.") for name in header.shapes):
        return "", convert_vae
    names = " or ".join(f"{prefix}*" for prefix in converters) or kind.__name__
    hint = "Add a VAE with --vae." if kind is AutoencoderKL else "Use a file with the complete model."
    raise DataError(f"{header.file} has no {kind.__name__}: it has no tensors {names}.", hint)


def read_tensors(header: Header, prefix: str, on_meta: bool) -> dict[str, Tensor]:
    """Read the tensors with this prefix, or create them on the meta device; the names keep the prefix."""
    names = [name for name in header.shapes if name.startswith(prefix)]
    if on_meta:
        return {name: torch.empty(header.shapes[name], device="meta") for name in names}
    with safe_open(header.file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


def read_transformer_depths(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config entries for the transformer blocks of a UNet in a single file; {} if they are as in `config`.

    Distilled models such as SSD-1B differ from their family, SDXL, only in these numbers.
    """
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    starts = range(0, levels * (layers + 1), layers + 1)  # a down level has a downsampler, an up level one more layer
    down = [
        [count_transformer_blocks(header, INPUT_BLOCK.format(1 + start + i)) for i in range(layers)] for start in starts
    ]
    up = [
        [count_transformer_blocks(header, OUTPUT_BLOCK.format(start + i)) for i in range(layers + 1)]
        for start in starts
    ]
    if (down, up) == expand_config_depths(config):
        return {}
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}


def expand_config_depths(config: Mapping[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the number of transformer blocks of each layer by the config: of the down levels, and of the up levels."""
    layers, down_types, up_types = config["layers_per_block"], config["down_block_types"], config["up_block_types"]
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(down_types) if isinstance(depths, int) else list(depths)
    down = [[depth if "CrossAttn" in kind else 0] * layers for kind, depth in zip(down_types, depths, strict=True)]
    up = [
        [depth if "CrossAttn" in kind else 0] * (layers + 1) for kind, depth in zip(up_types, depths[::-1], strict=True)
    ]
    return down, up


def count_transformer_blocks(header: Header, prefix: str) -> int:
    """Count the transformer blocks with this prefix in the UNet, e.g. "input_blocks.4.1."."""
    start = f"{UNET_PREFIX}{prefix}transformer_blocks."
    return len({name.removeprefix(start).split(".")[0] for name in header.shapes if name.startswith(start)})
