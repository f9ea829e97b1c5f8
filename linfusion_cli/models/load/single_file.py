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
from linfusion_cli.models.families.compatibility import UNET
from linfusion_cli.models.families.facts import VAE
from linfusion_cli.models.files.header import Header

CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIP = "cond_stage_model.model."  # the one encoder of SD 2.1
OPEN_CLIP_BESIDE = "conditioner.embedders.1.model."  # the second of SDXL
SCALES = ("scale_weight", "scale_input", "scaled_fp8")
INPUTS, OUTPUTS = "input_blocks.{}.1.", "output_blocks.{}.1."

Convert = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


def convert_unet(unet: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return convert_ldm_unet_checkpoint(tensors, unet.config)


def convert_vae(vae: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return convert_ldm_vae_checkpoint(tensors, vae.config)


def convert_clip(encoder: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return convert_ldm_clip_checkpoint(tensors)


def convert_open_clip(prefix: str) -> Convert:
    """SDXL's file holds the projection as it is multiplied with from the right; SD 2.1's encoder has none."""
    return lambda encoder, tensors: convert_open_clip_checkpoint(encoder, tensors, prefix=prefix)


# What kind of network -> where it may lie in a file, and how it is renamed there.
PLACES: dict[type, dict[str, Convert]] = {
    UNet2DConditionModel: {UNET: convert_unet},
    AutoencoderKL: {VAE: convert_vae},
    CLIPTextModel: {prefix: convert_clip for prefix in CLIP} | {OPEN_CLIP: convert_open_clip(OPEN_CLIP)},
    CLIPTextModelWithProjection: {OPEN_CLIP_BESIDE: convert_open_clip(OPEN_CLIP_BESIDE)},
}


def state_in(header: Header, module: nn.Module, on_meta: bool = False) -> dict[str, Tensor]:
    """The tensors for `module` in a single file, as diffusers names them; without numbers if `on_meta`.

    Raises DataError where the file has no part for it, or one of another shape than renaming can take.
    """
    prefix, convert = place_in(header, type(module))
    header.check_types(prefix)
    check_unscaled(header, prefix)
    tensors = tensors_of(header, prefix, on_meta)
    if prefix == "" and module.state_dict().keys() <= tensors.keys():
        return tensors  # its names are diffusers' already
    try:
        return convert(module, tensors)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise DataError(f"{header.file} does not hold what its family has ({error!r}).", "Use another file.") from error


def check_unscaled(header: Header, prefix: str) -> None:
    """Raise DataError for weights in fp8 with scales beside them: alone they would be other numbers."""
    if scale := next((name for name in header.shapes if name.startswith(prefix) and name.endswith(SCALES)), None):
        reason = f"{header.file} holds scaled weights ({scale}), which are not read."
        raise DataError(reason, "Use a file in fp32, fp16 or bf16.")


def place_in(header: Header, kind: type) -> tuple[str, Convert]:
    """What the names of the network of this kind begin with, and how it is renamed; raises DataError where it is not.

    A file with nothing but a VAE in it may have names without a prefix.
    """
    places = PLACES.get(kind, {})
    for prefix, convert in places.items():
        if any(name.startswith(prefix) for name in header.shapes):
            return prefix, convert
    if kind is AutoencoderKL and any(name.startswith("decoder.") for name in header.shapes):
        return "", convert_vae
    names = " or ".join(f"{prefix}*" for prefix in places) or kind.__name__
    hint = "Name a VAE with --vae." if kind is AutoencoderKL else "Use a file that holds the whole model."
    raise DataError(f"{header.file} holds no {kind.__name__}: nothing in it is called {names}.", hint)


def tensors_of(header: Header, prefix: str, on_meta: bool) -> dict[str, Tensor]:
    """Those whose name begins with `prefix`, under their own names."""
    names = [name for name in header.shapes if name.startswith(prefix)]
    if on_meta:
        return {name: torch.empty(header.shapes[name], device="meta") for name in names}
    with safe_open(header.file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in names}


def depths_in(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """How many transformer blocks the UNet in a single file has, in the terms of its config.

    Models that were cut down from a larger one, as SSD-1B was from SDXL, differ from their family in this alone.
    """
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    places = range(0, levels * (layers + 1), layers + 1)  # a level ends with its downsampling, or has a layer more
    down = [[depth(header, INPUTS.format(1 + place + i)) for i in range(layers)] for place in places]
    up = [[depth(header, OUTPUTS.format(place + i)) for i in range(layers + 1)] for place in places]
    if (down, up) == family_depths(config):
        return {}
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}


def family_depths(config: Mapping[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
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


def depth(header: Header, place: str) -> int:
    """The transformer blocks at a place of the UNet, such as "input_blocks.4.1."."""
    start = f"{UNET}{place}transformer_blocks."
    return len({name.removeprefix(start).split(".")[0] for name in header.shapes if name.startswith(start)})
