"""Load and save LinFusion weights: `config.json` with `modules_list`, and `diffusion_pytorch_model.safetensors`.

The layout is that of the published repositories `Yuanshi/LinFusion-XL`, `-2-1` and `-1-5`: tensor `{i}.to_q.weight`
belongs to the i-th entry of `modules_list`, which contains the path of the UNet module that it replaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from linfusion_cli.core.errors import DataError, InputNotFound
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions, get_attention_shape

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CONFIG_NAME = "config.json"
HINT_OTHER_WEIGHTS = "Use --linfusion with weights for this model, or --linfusion none."


@dataclass(frozen=True)
class ModuleSpec:
    """One entry of `modules_list`."""

    module_name: str
    dim_n: int
    heads: int
    projection_mid_dim: int | None = None


def save_weights(folder: Path, modules: Mapping[str, LinearAttention], dtype: torch.dtype = torch.float16) -> None:
    """Write `modules` (UNet path -> module, in the order of `named_modules()`) in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = [build_spec(path, module).__dict__ for path, module in modules.items()]
    config = {"_class_name": "LinFusion", "_diffusers_version": "0.27.0", "modules_list": specs}
    tensors = nn.ModuleList(modules.values()).state_dict()
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def build_spec(path: str, module: LinearAttention) -> ModuleSpec:
    """Return the entry of `modules_list` for `module`."""
    dim = module.to_q.in_features
    if isinstance(module.to_q_, nn.Identity):
        return ModuleSpec(path, dim, module.heads, -1)
    mid = cast(nn.Linear, module.to_q_[0]).out_features
    return ModuleSpec(path, dim, module.heads, None if mid == dim else mid)


def load_weights(folder: Path, unet: nn.Module, dtype: torch.dtype) -> dict[str, LinearAttention]:
    """Load the weights in `folder` for `unet` on the CPU in `dtype`, and return UNet path -> module.

    Weights for a larger UNet fit a UNet with some of its layers removed: the other modules are not read. Raises
    InputNotFound if a file is missing, and DataError with the first module or tensor that does not fit.
    """
    specs, entries = read_specs(folder / CONFIG_NAME), match_specs(folder, unet)
    linear = {str(index): build_meta_module(spec) for index, spec in entries.items()}
    modules = nn.ModuleDict(linear)
    skipped = {str(index) for index in range(len(specs))} - modules.keys()
    tensors = read_tensors(folder / WEIGHTS_NAME, modules.state_dict(), dtype, skipped)
    modules.load_state_dict(tensors, assign=True)
    return {spec.module_name: linear[str(index)].eval().requires_grad_(False) for index, spec in entries.items()}


def build_meta_modules(folder: Path, unet: nn.Module) -> dict[str, LinearAttention]:
    """Build the modules of `load_weights` on the meta device, from the config alone."""
    return {spec.module_name: build_meta_module(spec) for spec in match_specs(folder, unet).values()}


def count_unused_modules(folder: Path, unet: nn.Module) -> int:
    """Count the modules in `folder` that the UNet does not have."""
    return len(read_specs(folder / CONFIG_NAME)) - len(match_specs(folder, unet))


def build_meta_module(spec: ModuleSpec) -> LinearAttention:
    """Build the module of an entry on the meta device."""
    with torch.device("meta"):
        return LinearAttention(spec.dim_n, spec.heads, spec.projection_mid_dim)


def match_specs(folder: Path, unet: nn.Module) -> dict[int, ModuleSpec]:
    """Return index in `modules_list` -> entry for the modules that `unet` has; raises DataError if one does not fit.

    The index is the prefix of the tensor names.
    """
    specs = read_specs(folder / CONFIG_NAME)
    check_specs(folder, specs, unet)
    paths = find_self_attentions(unet)
    return {index: spec for index, spec in enumerate(specs) if spec.module_name in paths}


def read_specs(path: Path) -> list[ModuleSpec]:
    """Read the entries of `modules_list` from the config file at `path`."""
    if not path.is_file():
        raise InputNotFound(f"The LinFusion config {path} does not exist.", "--linfusion takes a folder or a hub id.")
    fields = ModuleSpec.__dataclass_fields__
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["modules_list"]
        return [ModuleSpec(**{key: value for key, value in entry.items() if key in fields}) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a LinFusion config ({error!r}).", HINT_OTHER_WEIGHTS) from error


def check_specs(folder: Path, specs: list[ModuleSpec], unet: nn.Module) -> None:
    """Raise DataError with the first self-attention of `unet` that is missing in `specs` or has another shape."""
    wanted = {path: get_attention_shape(attention) for path, attention in find_self_attentions(unet).items()}
    given = {spec.module_name: (spec.dim_n, spec.heads) for spec in specs}
    for path, shape in wanted.items():
        if given.get(path) != shape:
            raise DataError(
                f"The LinFusion weights in {folder} do not fit the model: {path} has {_format_shape(given.get(path))} "
                f"in the weights and {_format_shape(shape)} in the model.",
                HINT_OTHER_WEIGHTS,
            )


def _format_shape(shape: tuple[int, int] | None) -> str:
    return "no such layer" if shape is None else f"{shape[0]} channels in {shape[1]} heads"


def read_tensors(
    path: Path, wanted: Mapping[str, torch.Tensor], dtype: torch.dtype, skipped: Set[str] = frozenset()
) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file in `dtype`; names and shapes must match those of `wanted`.

    Names that start with an index in `skipped` and a dot are ignored.
    """
    if not path.is_file():
        raise InputNotFound(f"The LinFusion weights {path} do not exist.", "--linfusion takes a folder or a hub id.")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.partition(".")[0] not in skipped]  # noqa: SIM118 - no dict
            _check_tensors(path, {name: tuple(file.get_slice(name).get_shape()) for name in names}, wanted)
            # Clone, because mapped tensors have other alignments, and CPU results then differ by 1e-5.
            return {name: _check_finite(path, name, file.get_tensor(name)).to(dtype).clone() for name in wanted}
    except SafetensorError as error:
        raise DataError(f"{path} is not a complete safetensors file ({error}).", "Download it again.") from error


def _check_finite(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`; raises DataError if it is not floating-point or contains NaN or Inf."""
    if not tensor.is_floating_point() or not tensor.sum(dtype=torch.float32).isfinite():
        raise DataError(f"{path} is damaged: {name} contains values that are not finite numbers.", "Download it again.")
    return tensor


def _check_tensors(path: Path, given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, torch.Tensor]) -> None:
    for name in [*wanted, *given]:
        shape = tuple(wanted[name].shape) if name in wanted else "no such tensor"
        if given.get(name, "no such tensor") != shape:
            raise DataError(
                f"{path} does not fit the model: {name} is {given.get(name, 'no such tensor')} in the file "
                f"and {shape} in the model.",
                HINT_OTHER_WEIGHTS,
            )
