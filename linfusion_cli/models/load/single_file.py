"""Single files in the layout of the original Stable Diffusion and SDXL code: their tensors as diffusers names them.

The renaming is diffusers' own (`loaders/single_file_utils.py`). It takes dictionaries, so that a file is read part by
part, and a header alone, as tensors on the meta device, can be checked like the file itself.
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
SD21_OPEN_CLIP_PREFIX = "cond_stage_model.model."  # the one encoder of SD 2.1
SDXL_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."  # the second of SDXL
SCALE_SUFFIXES = ("scale_weight", "scale_input", "scaled_fp8")
INPUT_BLOCK, OUTPUT_BLOCK = "input_blocks.{}.1.", "output_blocks.{}.1."

Convert = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


def convert_unet(unet: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return convert_ldm_unet_checkpoint(tensors, unet.config)


def convert_vae(vae: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return convert_ldm_vae_checkpoint(tensors, vae.config)


def convert_clip(encoder: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return convert_ldm_clip_checkpoint(tensors)


def build_open_clip_converter(prefix: str) -> Convert:
    """SDXL's file holds the projection as it is multiplied with from the right; SD 2.1's encoder has none."""
    return lambda encoder, tensors: convert_open_clip_checkpoint(encoder, tensors, prefix=prefix)


# What kind of network -> where it may lie in a file, and how it is renamed there.
CONVERTERS: dict[type, dict[str, Convert]] = {
    UNet2DConditionModel: {UNET_PREFIX: convert_unet},
    AutoencoderKL: {VAE_PREFIX: convert_vae},
    CLIPTextModel: {prefix: convert_clip for prefix in CLIP_PREFIXES}
    | {SD21_OPEN_CLIP_PREFIX: build_open_clip_converter(SD21_OPEN_CLIP_PREFIX)},
    CLIPTextModelWithProjection: {SDXL_OPEN_CLIP_PREFIX: build_open_clip_converter(SDXL_OPEN_CLIP_PREFIX)},
}


def read_state_dict(header: Header, module: nn.Module, on_meta: bool = False) -> dict[str, Tensor]:
    """The tensors for `module` in a single file, as diffusers names them; without numbers if `on_meta`.

    Raises DataError where the file has no part for it, or one of another shape than renaming can take.
    """
    prefix, convert = find_converter(header, type(module))
    header.check_dtypes(prefix)
    reject_scaled_weights(header, prefix)
    tensors = read_tensors(header, prefix, on_meta)
    if prefix == "" and module.state_dict().keys() <= tensors.keys():
        return tensors  # its names are diffusers' already
    try:
        return convert(module, tensors)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise DataError(f"{header.file} does not hold what its family has ({error!r}).", "Use another file.") from error


def reject_scaled_weights(header: Header, prefix: str) -> None:
    """Raise DataError for weights in fp8 with scales beside them: alone they would be other numbers."""
    if scale := next(
        (name for name in header.shapes if name.startswith(prefix) and name.endswith(SCALE_SUFFIXES)), None
    ):
        reason = f"{header.file} holds scaled weights ({scale}), which are not read."
        raise DataError(reason, "Use a file in fp32, fp16 or bf16.")


def find_converter(header: Header, kind: type) -> tuple[str, Convert]:
    """What the names of the network of this kind begin with, and how it is renamed; raises DataError where it is not.

    A file with nothing but a VAE in it may have names without a prefix.
    """
    places = CONVERTERS.get(kind, {})
    for prefix, convert in places.items():
        if any(name.startswith(prefix) for name in header.shapes):
            return prefix, convert
    if kind is AutoencoderKL and any(name.startswith("decoder.") for name in header.shapes):
        return "", convert_vae
    names = " or ".join(f"{prefix}*" for prefix in places) or kind.__name__
    hint = "Name a VAE with --vae." if kind is AutoencoderKL else "Use a file that holds the whole model."
    raise DataError(f"{header.file} holds no {kind.__name__}: nothing in it is called {names}.", hint)


def read_tensors(header: Header, prefix: str, on_meta: bool) -> dict[str, Tensor]:
    """Those whose name begins with `prefix`, under their own names."""
    names = [name for name in header.shapes if name.startswith(prefix)]
    if on_meta:
        return {name: torch.empty(header.shapes[name], device="meta") for name in names}
    with safe_open(header.file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


def read_transformer_depths(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """How many transformer blocks the UNet in a single file has, in the terms of its config.

    Models that were cut down from a larger one, as SSD-1B was from SDXL, differ from their family in this alone.
    """
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    places = range(0, levels * (layers + 1), layers + 1)  # a level ends with its downsampling, or has a layer more
    down = [
        [count_transformer_blocks(header, INPUT_BLOCK.format(1 + place + i)) for i in range(layers)] for place in places
    ]
    up = [
        [count_transformer_blocks(header, OUTPUT_BLOCK.format(place + i)) for i in range(layers + 1)]
        for place in places
    ]
    if (down, up) == expand_config_depths(config):
        return {}
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}


def expand_config_depths(config: Mapping[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """The transformer blocks after each layer of the levels down, and up, that a UNet's config says."""
    layers, kinds = config["layers_per_block"], (config["down_block_types"], config["up_block_types"])
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(kinds[0]) if isinstance(depths, int) else list(depths)
    ways = zip(kinds, (depths, depths[::-1]), (layers, layers + 1), strict=True)
    down, up = (
        [[blocks if "CrossAttn" in kind else 0] * count for kind, blocks in zip(names, way, strict=True)]
        for names, way, count in ways
    )
    return down, up


def count_transformer_blocks(header: Header, place: str) -> int:
    """The transformer blocks at a place of the UNet, such as "input_blocks.4.1."."""
    start = f"{UNET_PREFIX}{place}transformer_blocks."
    return len({name.removeprefix(start).split(".")[0] for name in header.shapes if name.startswith(start)})
