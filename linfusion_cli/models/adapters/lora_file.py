"""Read LoRA files in the layouts of diffusers, PEFT and kohya-ss: the factors of each layer of each network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from torch import Tensor

from linfusion_cli.core.errors import DataError
from linfusion_cli.models.files.header import Header, read_header

FACTOR_NAME = re.compile(r"(?P<layer>.+)[._]lora(?:_linear_layer)?[._](?P<side>A|B|down|up)\.weight")
SIDES = {"A": "down", "B": "up"}
ALPHA_SUFFIX = ".alpha"
NETWORK_PREFIX = re.compile(r"^(?:unet\.|lora_unet_|diffusion_model\.|text_encoder(?:_2)?\.|lora_te[12]?_)")
TEXT_PREFIXES = {
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}
UNET_PART = "unet"
UNSUPPORTED_MARKERS = ("dora_scale", "lora_magnitude_vector", "hada_", "lokr_", "oft_")


@dataclass(frozen=True)
class Factors:
    """Update of one layer: `down` [rank, in, ...], `up` [out, rank, ...], any float dtype; `scale` is alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights: [out, in] or [out, in, k, k]."""
        return (self.up.shape[0], *self.down.shape[1:])

    def add_to(self, weights: Tensor, weight: float) -> None:
        """Add weight · alpha / rank · up @ down to `weights` in fp32; device, dtype and memory format do not change."""
        wide = weights.to(torch.float32, memory_format=torch.contiguous_format)
        up, down = (factor.to(wide).flatten(1) for factor in (self.up, self.down))
        wide.view(len(wide), -1).addmm_(up, down, alpha=weight * self.scale)
        weights.copy_(wide)


@dataclass(frozen=True)
class Lora:
    """Updates of one network of a model: layer name in the file to factors."""

    file: Path
    part: str
    layers: dict[str, Factors]


def read_lora(file: Path, part: str) -> Lora:
    """Read the updates of `part`, "unet", "text_encoder" or "text_encoder_2"; a file can have none.

    Raise DataError if the file is not a LoRA, is broken, or is of an unsupported kind.
    """
    header = read_header(file)
    check_kind(header)
    names = [name for name in header.shapes if find_target_part(name) == part]
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise build_broken_error(file, f"it cannot be read ({error}).") from error
    return Lora(file, part, group_factors(file, tensors, read_adapter_config(header, part)))


def check_parts(file: Path, parts: Iterable[str]) -> None:
    """Raise DataError if the LoRA changes a text encoder that is not in `parts`, those of the model."""
    changed = {find_target_part(name) for name in read_header(file).shapes}
    for part in sorted(changed - {UNET_PART} - set(parts)):
        reason = f"The LoRA {file} does not fit the model: it changes {part}, which the model does not have."
        raise DataError(reason, "Use a LoRA for the family of this model.")


def find_target_part(name: str) -> str:
    """Return the network that the tensor `name` changes, by its prefix; the UNet by default."""
    return next((part for part, prefixes in TEXT_PREFIXES.items() if name.startswith(prefixes)), UNET_PART)


def check_kind(header: Header) -> None:
    """Raise DataError unless the file has tensors, and all are low-rank factors or alphas."""
    other = [name for name in header.shapes if not (FACTOR_NAME.fullmatch(name) or name.endswith(ALPHA_SUFFIX))]
    if len(other) == len(header.shapes) and not any(kind in name for name in other for kind in UNSUPPORTED_MARKERS):
        reason = f"it has the tensor {other[0]}" if other else "it has no tensors"
        raise DataError(f"{header.file} is not a LoRA: {reason}.", "Use the safetensors file of a LoRA.")
    if other:
        raise build_kind_error(header.file, f"it has the tensor {other[0]}")


def group_factors(file: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Factors]:
    """Return layer name to factors; raise DataError if tensors are invalid."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, part = parse_tensor_name(name)
        is_valid_dtype = tensor.is_floating_point() or part == ALPHA_SUFFIX  # some files have integer alphas
        if not is_valid_dtype or not bool(tensor.float().isfinite().all()):
            raise build_broken_error(file, f"{name} is not floating-point or contains NaN or Inf.")
        layers.setdefault(layer, {})[part] = tensor
    return {layer: build_factors(file, layer, parts, config) for layer, parts in layers.items()}


def parse_tensor_name(name: str) -> tuple[str, str]:
    """Split a tensor name into its layer and `down`, `up` or `.alpha`."""
    match = FACTOR_NAME.fullmatch(name)
    if match is None:
        return name.removesuffix(ALPHA_SUFFIX), ALPHA_SUFFIX
    return match["layer"], SIDES.get(match["side"], match["side"])


def build_factors(file: Path, layer: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Factors:
    """Build the factors of one layer; raise DataError if a factor is missing or the shapes do not match."""
    down, up, alpha = (parts.get(part) for part in ("down", "up", ALPHA_SUFFIX))
    if down is None or up is None:
        raise build_broken_error(file, f"{layer} lacks one of the two factors.")
    rank = math.prod(up.shape[1:])
    if min(up.dim(), down.dim()) < 2 or not rank or rank != down.shape[0]:
        raise build_broken_error(
            file, f"the factors of {layer} have the shapes {tuple(up.shape)} and {tuple(down.shape)}."
        )
    if alpha is not None and alpha.numel() != 1:
        raise build_broken_error(file, f"the alpha of {layer} is not a single number.")
    return Factors(down, up, compute_scale(layer, rank, config) if alpha is None else alpha.item() / rank)


def read_adapter_config(header: Header, part: str) -> dict[str, Any]:
    """Read the PEFT LoraConfig for `part` from the header, by default {}; raise DataError if it is invalid."""
    try:
        config = json.loads(header.metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        prefix = f"{part}."
        part_config = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
        patterns = part_config.get("alpha_pattern") or {}
        if not all(math.isfinite(alpha) for alpha in (*patterns.values(), part_config.get("lora_alpha", 1))):
            raise ValueError("an alpha is not finite")
        for pattern in patterns:
            re.compile(pattern)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise build_broken_error(header.file, f"its LoraConfig in the header is invalid ({error}).") from error
    if part_config.get("use_dora"):
        raise build_kind_error(header.file, "it is a DoRA by its header")
    return part_config


def build_broken_error(file: Path, reason: str) -> DataError:
    """Return the error for a LoRA with invalid contents."""
    return DataError(f"The LoRA {file} is broken: {reason}", "Download it again, or use another LoRA.")


def build_kind_error(file: Path, reason: str) -> DataError:
    """Return the error for a LoRA with anything but two factors and an alpha per layer."""
    hint = "Use a standard LoRA. DoRA, LoHa, LoKr and other kinds are not supported."
    return DataError(f"The LoRA {file} is of an unsupported kind: {reason}.", hint)


def compute_scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732), from the PEFT config; 1 by default."""
    from peft.utils.other import get_pattern_key

    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), NETWORK_PREFIX.sub("", layer)), config.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
