"""Read the parts of a model in diffusers' folder layout: safetensors only, from this machine only."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn

from linfusion_cli.device import is_out_of_memory
from linfusion_cli.errors import DataError, Unavailable, first_line
from linfusion_cli.models.families import read_config
from linfusion_cli.models.locate import weights_files

Vae = AutoencoderKL | AutoencoderTiny
Part = TypeVar("Part", bound=nn.Module)

diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()


def load_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet of the model in `folder`, on the CPU, where its attention can be replaced before it moves."""
    return load_part(UNet2DConditionModel, folder / "unet", dtype, torch.device("cpu"))


def load_vae(folder: Path, dtype: torch.dtype, device: torch.device) -> Vae:
    """The VAE in `folder`, ready to run."""
    return load_part(vae_kind(folder), folder, dtype, device)


def vae_kind(folder: Path) -> type[Vae]:
    """The class of the VAE in `folder`, by its config; raises DataError for one that is not known."""
    name = read_config(folder / "config.json").get("_class_name", AutoencoderKL.__name__)
    kinds = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}
    if name not in kinds:
        raise DataError(f"The VAE in {folder} is of the kind {name}.", f"Use one of the kinds {', '.join(kinds)}.")
    return kinds[name]


def outline(kind: type[Part], part: Path) -> Part:
    """A part of a model without its weights: what its config says, on the meta device."""
    config = read_config(part / "config.json")
    try:
        with torch.device("meta"):
            return kind.from_config(config).eval().requires_grad_(False)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = f"{part / 'config.json'} makes no {kind.__name__} ({first_line(error)})."
        raise DataError(reason, "Download the model again.") from error


def load_part(kind: type[Part], part: Path, dtype: torch.dtype, device: torch.device) -> Part:
    """One part of a model, as `kind`, its convolutions' weights in channels-last, in which they run fastest.

    Raises Unavailable when files are missing, DataError when they are broken.
    """
    files = weights_files(part)
    if not files:
        raise Unavailable(f"The model is incomplete: {part} has no weights.", "Add --download, or use another --model.")
    for file in files:
        check_header(file)
    options = {"variant": "fp16"} if ".fp16" in files[0].name else {}
    options |= {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        module, found = kind.from_pretrained(str(part), **options)
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"The weights in {part} do not fit its config.json ({first_line(error)})."
        raise DataError(reason, "Download the model again.") from error
    if found["missing_keys"]:  # the libraries would go on with random numbers in their place
        raise DataError(f"The weights in {part} lack {min(found['missing_keys'])}.", "Download the model again.")
    if device.type == "cpu":
        own_memory(module)
    return module.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def check_header(file: Path) -> None:
    """Raise DataError unless `file` is a safetensors file of the length that its header says."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is not a whole safetensors file ({error}).", "Download it again.") from error


def own_memory(module: nn.Module) -> None:
    """Copy the parameters out of the mapped file: its other alignments make CPU results differ by 1e-5."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
