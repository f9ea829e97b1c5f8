"""A LoRA's file: safetensors in the layouts of diffusers, PEFT and kohya-ss -> the factors of each network's layers."""

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
    """The change of one layer: `down` [rank, in, ...] and `up` [out, rank, ...], any float; `scale` is alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights that they change, [out, in] or [out, in, k, k]."""
        return (self.up.shape[0], *self.down.shape[1:])

    def add_to(self, weights: Tensor, weight: float) -> None:
        """Add weight · alpha / rank · up @ down to `weights`, in fp32; they keep their device, dtype and format."""
        wide = weights.to(torch.float32, memory_format=torch.contiguous_format)
        up, down = (factor.to(wide).flatten(1) for factor in (self.up, self.down))
        wide.view(len(wide), -1).addmm_(up, down, alpha=weight * self.scale)
        weights.copy_(wide)


@dataclass(frozen=True)
class Lora:
    """What a file changes of one part of a model: layer, as the file names it, -> factors."""

    file: Path
    part: str
    layers: dict[str, Factors]


def read_lora(file: Path, part: str) -> Lora:
    """Read what a LoRA changes of `part`: "unet", "text_encoder" or "text_encoder_2"; nothing, perhaps.

    Raises DataError for a file that is no LoRA, is broken, or is of another kind.
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
    """Raise DataError for a LoRA that changes a text encoder, and the model, of these `parts`, has none such."""
    changed = {find_target_part(name) for name in read_header(file).shapes}
    for part in sorted(changed - {UNET_PART} - set(parts)):
        reason = f"The LoRA {file} does not fit the model: it changes {part}, which the model does not have."
        raise DataError(reason, "Use a LoRA made for this model's family.")


def find_target_part(name: str) -> str:
    """Which part of a model the tensor called `name` changes: the UNet, unless it says otherwise."""
    return next((part for part, prefixes in TEXT_PREFIXES.items() if name.startswith(prefixes)), UNET_PART)


def check_kind(header: Header) -> None:
    """Raise DataError unless the file's tensors, and there are some, are low-rank factors and their alphas alone."""
    other = [name for name in header.shapes if not (FACTOR_NAME.fullmatch(name) or name.endswith(ALPHA_SUFFIX))]
    if len(other) == len(header.shapes) and not any(kind in name for name in other for kind in UNSUPPORTED_MARKERS):
        holds = f"it holds {other[0]}" if other else "it holds no factors"
        raise DataError(f"{header.file} is no LoRA: {holds}.", "Name a LoRA's safetensors file.")
    if other:
        raise build_kind_error(header.file, f"it holds {other[0]}")


def group_factors(file: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Factors]:
    """Layer, as the file names it, -> its factors; raises DataError where they are broken."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, part = parse_tensor_name(name)
        is_number = tensor.is_floating_point() or part == ALPHA_SUFFIX  # some write alphas as integers
        if not is_number or not bool(tensor.float().isfinite().all()):
            raise build_broken_error(file, f"{name} is not all finite numbers.")
        layers.setdefault(layer, {})[part] = tensor
    return {layer: build_factors(file, layer, parts, config) for layer, parts in layers.items()}


def parse_tensor_name(name: str) -> tuple[str, str]:
    """A tensor's name -> its layer, and which part of it the tensor is: `down`, `up` or `.alpha`."""
    match = FACTOR_NAME.fullmatch(name)
    if match is None:
        return name.removesuffix(ALPHA_SUFFIX), ALPHA_SUFFIX
    return match["layer"], SIDES.get(match["side"], match["side"])


def build_factors(file: Path, layer: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Factors:
    """The factors of one layer from its parts; raises DataError where they make none."""
    down, up, alpha = (parts.get(part) for part in ("down", "up", ALPHA_SUFFIX))
    if down is None or up is None:
        raise build_broken_error(file, f"{layer} lacks one of its two factors.")
    rank = math.prod(up.shape[1:])
    if min(up.dim(), down.dim()) < 2 or not rank or rank != down.shape[0]:
        raise build_broken_error(file, f"the factors of {layer} are {tuple(up.shape)} and {tuple(down.shape)}.")
    if alpha is not None and alpha.numel() != 1:
        raise build_broken_error(file, f"the alpha of {layer} is no number.")
    return Factors(down, up, compute_scale(layer, rank, config) if alpha is None else alpha.item() / rank)


def read_adapter_config(header: Header, part: str) -> dict[str, Any]:
    """What diffusers wrote of PEFT's LoraConfig for `part` into the file's header, {} where nothing is; DataError."""
    try:
        config = json.loads(header.metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        prefix = f"{part}."
        found = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
        patterns = found.get("alpha_pattern") or {}
        if not all(math.isfinite(alpha) for alpha in (*patterns.values(), found.get("lora_alpha", 1))):
            raise ValueError("an alpha is not finite")
        for pattern in patterns:
            re.compile(pattern)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise build_broken_error(header.file, f"its header says nonsense ({error}).") from error
    if found.get("use_dora"):
        raise build_kind_error(header.file, "its header says DoRA")
    return found


def build_broken_error(file: Path, what: str) -> DataError:
    """The error for a LoRA with which nothing can be done."""
    return DataError(f"The LoRA {file} is broken: {what}", "Download it again, or use another one.")


def build_kind_error(file: Path, why: str) -> DataError:
    """The error for a LoRA that is more than two factors and an alpha for each layer."""
    hint = "Use a plain LoRA: DoRA, LoHa, LoKr and other kinds are not read."
    return DataError(f"The LoRA {file} is of an unknown kind: {why}.", hint)


def compute_scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732), by PEFT's config; 1 where it says nothing."""
    from peft.utils.other import get_pattern_key

    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas, NETWORK_PREFIX.sub("", layer)), config.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
