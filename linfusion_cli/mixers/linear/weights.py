"""LinFusion's published weights: `config.json` with `modules_list`, and `diffusion_pytorch_model.safetensors`.

Layout as in the published repositories `Yuanshi/LinFusion-XL`, `-2-1` and `-1-5`: tensor `{i}.to_q.weight` belongs to
the i-th entry of `modules_list`, which names the UNet's module that it replaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from linfusion_cli.core.errors import DataError, InputNotFound
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import self_attentions

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CONFIG_NAME = "config.json"
WAY_OUT = "Name weights made for this model with --linfusion, or use --linfusion none."


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
    specs = [spec_of(path, module).__dict__ for path, module in modules.items()]
    config = {"_class_name": "LinFusion", "_diffusers_version": "0.27.0", "modules_list": specs}
    tensors = nn.ModuleList(modules.values()).state_dict()
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def spec_of(path: str, module: LinearAttention) -> ModuleSpec:
    """The entry of `modules_list` that describes `module`."""
    dim = module.to_q.in_features
    if isinstance(module.to_q_, nn.Identity):
        return ModuleSpec(path, dim, module.heads, -1)
    mid = module.to_q_[0].out_features
    return ModuleSpec(path, dim, module.heads, None if mid == dim else mid)


def load_weights(folder: Path, unet: nn.Module, dtype: torch.dtype) -> dict[str, LinearAttention]:
    """Read the weights in `folder` for `unet` -> UNet path -> module, on the CPU, in `dtype`.

    Weights made for a larger UNet serve one that was cut down from it: what that does not have is not read. Raises
    InputMissing when a file is absent, DataError naming the first module or tensor that does not fit.
    """
    specs, entries = read_specs(folder / CONFIG_NAME), entries_for(folder, unet)
    modules = nn.ModuleDict({str(place): empty(spec) for place, spec in entries.items()})
    left_out = {str(place) for place in range(len(specs))} - modules.keys()
    tensors = read_tensors(folder / WEIGHTS_NAME, modules.state_dict(), dtype, left_out)
    modules.load_state_dict(tensors, assign=True)
    return {spec.module_name: modules[str(place)].eval().requires_grad_(False) for place, spec in entries.items()}


def outline(folder: Path, unet: nn.Module) -> dict[str, LinearAttention]:
    """As `load_weights` without the weights: modules on the meta device, from the config alone."""
    return {spec.module_name: empty(spec) for spec in entries_for(folder, unet).values()}


def unused(folder: Path, unet: nn.Module) -> int:
    """How many of the modules in `folder` the UNet has no place for."""
    return len(read_specs(folder / CONFIG_NAME)) - len(entries_for(folder, unet))


def empty(spec: ModuleSpec) -> LinearAttention:
    """The module that an entry describes, on the meta device."""
    with torch.device("meta"):
        return LinearAttention(spec.dim_n, spec.heads, spec.projection_mid_dim)


def entries_for(folder: Path, unet: nn.Module) -> dict[int, ModuleSpec]:
    """Place in `modules_list`, which its tensors' names begin with -> entry, of those that `unet` has; DataError."""
    specs = read_specs(folder / CONFIG_NAME)
    check_specs(folder, specs, unet)
    paths = self_attentions(unet)
    return {place: spec for place, spec in enumerate(specs) if spec.module_name in paths}


def read_specs(path: Path) -> list[ModuleSpec]:
    """The entries of `modules_list` in the config file at `path`."""
    if not path.is_file():
        raise InputNotFound(f"LinFusion's config {path} is missing.", "--linfusion takes a folder or a hub id.")
    fields = ModuleSpec.__dataclass_fields__
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["modules_list"]
        return [ModuleSpec(**{key: value for key, value in entry.items() if key in fields}) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a LinFusion config ({error!r}).", WAY_OUT) from error


def check_specs(folder: Path, specs: list[ModuleSpec], unet: nn.Module) -> None:
    """Raise DataError naming the first self-attention of `unet` that `specs` lack or have in another shape."""
    wanted = {path: (module.to_q.in_features, module.heads) for path, module in self_attentions(unet).items()}
    given = {spec.module_name: (spec.dim_n, spec.heads) for spec in specs}
    for path, shape in wanted.items():
        if given.get(path) != shape:
            raise DataError(
                f"The LinFusion weights in {folder} do not fit the model: {path} has {_width(given.get(path))} in the "
                f"weights and {_width(shape)} in the model.",
                WAY_OUT,
            )


def _width(shape: tuple[int, int] | None) -> str:
    return "no such layer" if shape is None else f"{shape[0]} channels in {shape[1]} heads"


def read_tensors(
    path: Path, wanted: Mapping[str, torch.Tensor], dtype: torch.dtype, left_out: Set[str] = frozenset()
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, in `dtype`; names and shapes must be those of `wanted`.

    Names that begin with one of `left_out` and a dot are left out.
    """
    if not path.is_file():
        raise InputNotFound(f"LinFusion's weights {path} are missing.", "--linfusion takes a folder or a hub id.")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.partition(".")[0] not in left_out]
            _check_tensors(path, {name: tuple(file.get_slice(name).get_shape()) for name in names}, wanted)
            # A clone owns its memory: mapped tensors lie at other alignments, and CPU results then differ by 1e-5.
            return {name: _numbers(path, name, file.get_tensor(name)).to(dtype).clone() for name in wanted}
    except SafetensorError as error:
        raise DataError(f"{path} is not a whole safetensors file ({error}).", "Download it again.") from error


def _numbers(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or DataError where it holds no weights, or some that are no numbers."""
    if not tensor.is_floating_point() or not tensor.sum(dtype=torch.float32).isfinite():
        raise DataError(f"{path} is damaged: {name} is not all finite numbers.", "Download it again.")
    return tensor


def _check_tensors(path: Path, given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, torch.Tensor]) -> None:
    for name in [*wanted, *given]:
        shape = tuple(wanted[name].shape) if name in wanted else "no such tensor"
        if given.get(name, "no such tensor") != shape:
            raise DataError(
                f"{path} does not fit the model: {name} is {given.get(name, 'no such tensor')} in the file "
                f"and {shape} in the model.",
                WAY_OUT,
            )
