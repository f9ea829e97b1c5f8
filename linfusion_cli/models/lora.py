"""LoRA: a low-rank change of a UNet's weights, read from safetensors and added to them once, after loading.

    W += weight · alpha / rank · up @ down        down [rank, in], up [out, rank]; arXiv 2106.09685, section 4.1

A convolution [out, in, k, k] has down [rank, in, k, k] and up [out, rank, 1, 1]. A file names its layers as diffusers
and PEFT do (`unet.mid_block.attentions.0.proj_in.lora_A.weight`), as kohya-ss does (`lora_unet_`, every dot an
underscore), or either with the places of the original SDXL code (`middle_block.1.proj_in`): with underscores for dots
all are looked up in one table, made from the UNet itself. diffusers' converter instead turns every underscore into a
dot and mends what it knows by name, and it leaves out alphas that are not kohya's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from linfusion_cli.attention.linear import LinearAttention
from linfusion_cli.errors import DataError
from linfusion_cli.models.header import read_header

FACTOR = re.compile(r"(?P<layer>.+)[._]lora[._](?P<side>A|B|down|up)\.weight")
SIDES = {"A": "down", "B": "up"}
ALPHA = ".alpha"
UNET_PREFIX = re.compile(r"^(?:unet\.|lora_unet_|diffusion_model\.)")
TEXT_PREFIXES = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
OTHER_KINDS = ("dora_scale", "lora_magnitude_vector", "hada_", "lokr_", "oft_")
OTHER_FAMILY = "Use a LoRA made for this model's family."
ORIGINAL_PLACES = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
ORIGINAL_LAYERS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


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
        """Add weight · alpha / rank · up @ down to `weights`, in fp32; they keep their dtype and memory format."""
        wide = weights.to(torch.float32, memory_format=torch.contiguous_format)
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        wide.view(len(wide), -1).addmm_(up, down, alpha=weight * self.scale)
        weights.copy_(wide)


@dataclass(frozen=True)
class Lora:
    """What a file changes of a UNet: layer, as the file names it, -> factors; `has_text` of a text encoder, too."""

    file: Path
    layers: dict[str, Factors]
    has_text: bool


@dataclass(frozen=True)
class Merged:
    """How many of the UNet's layers a LoRA changed, and of linear attention's; `has_text` as in `Lora`: not used."""

    layers: int
    linear_layers: int
    has_text: bool


@torch.no_grad()
def merge_lora(unet: UNet2DConditionModel, linear: Mapping[str, LinearAttention], file: Path, weight: float) -> Merged:
    """Add the LoRA in `file`, times `weight`, to the UNet's weights and to those of linear attention, in place.

    `linear` has UNet path -> module, none of them mounted now: each is changed as the `attn1` whose place it takes.
    Sums are taken in fp32 and rounded once. Raises DataError, with all weights as they were, for a file that is no
    LoRA, is of another kind, or does not fit.
    """
    lora = read_lora(file)
    layers = fit(lora, unet)
    twins = linear_layers(linear)
    for path, factors in layers.items():
        factors.add_to(unet.get_submodule(path).weight, weight)
        if path in twins:
            factors.add_to(twins[path].weight, weight)
    return Merged(len(layers), len(layers.keys() & twins.keys()), lora.has_text)


def linear_layers(linear: Mapping[str, LinearAttention]) -> dict[str, nn.Module]:
    """UNet path -> layer, of the linear attentions' layers that stand where the original attention has one."""
    names = ("to_q", "to_k", "to_v", "to_out.0")
    return {f"{path}.{name}": module.get_submodule(name) for path, module in linear.items() for name in names}


def fit(lora: Lora, unet: UNet2DConditionModel) -> dict[str, Factors]:
    """UNet path -> factors of all layers; raises DataError naming the first that the UNet does not have like this."""
    paths = layer_paths(unet)
    found: dict[str, Factors] = {}
    for name, factors in lora.layers.items():
        spelling = spelled(name)
        path = paths.get(spelling)
        shape = None if path is None else tuple(unet.get_submodule(path).weight.shape)
        if shape is None or without_ones(shape) != without_ones(factors.shape):
            reason = f"{name} is {factors.shape} in the file and {shape or 'no such layer'} in the model."
            raise DataError(f"The LoRA {lora.file} does not fit the model: {reason}", OTHER_FAMILY)
        # Some files hold a layer under both names: as in diffusers, its own is the one that counts.
        if path not in found or spelling == path.replace(".", "_"):
            found[path] = factors
    return found


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out, in, 1, 1] -> [out, in]: one family has a 1 x 1 convolution where another has a linear layer."""
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape


def spelled(name: str) -> str:
    """A layer's name as it is looked up: without the prefix, and without what diffusers' old layout put into it."""
    name = UNET_PREFIX.sub("", name)
    if ".processor." in name:
        name = re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))
    return name.replace(".", "_")


def layer_paths(unet: UNet2DConditionModel) -> dict[str, str]:
    """Name -> UNet path of every layer, by its own name and its original one, underscores for dots in both."""
    paths, blocks = weighted(unet), dict(unet.named_modules())
    names = {original: path for original, path in ORIGINAL_PLACES.items() if path in paths}
    for place, path in original_places(unet):
        for layer in weighted(blocks[path]) if path in blocks else ():  # some smaller SDXLs have no middle
            names[f"{place}.{ORIGINAL_LAYERS.get(layer, layer)}".rstrip(".")] = f"{path}.{layer}".rstrip(".")
    names |= {path: path for path in paths}
    return {name.replace(".", "_"): path for name, path in names.items()}


def weighted(module: nn.Module) -> list[str]:
    """The paths of the linear layers and convolutions in `module`, "" for itself."""
    return [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def original_places(unet: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    """Place in the original SDXL code, and UNet path, of every block: input_blocks.4.1, down_blocks.1.attentions.0."""
    place = 1  # input_blocks.0 is conv_in
    for i, block in enumerate(unet.down_blocks):
        yield from original_layers(f"input_blocks.{place}", f"down_blocks.{i}", block)
        place += len(block.resnets)
        if block.downsamplers:
            yield f"input_blocks.{place}.0.op", f"down_blocks.{i}.downsamplers.0.conv"
            place += 1
    for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{i}", f"mid_block.{name}"
    place = 0
    for i, block in enumerate(unet.up_blocks):
        yield from original_layers(f"output_blocks.{place}", f"up_blocks.{i}", block)
        place += len(block.resnets)
        if block.upsamplers:  # the last thing in the place of the block's last layer
            number = 2 if hasattr(block, "attentions") else 1
            yield f"output_blocks.{place - 1}.{number}.conv", f"up_blocks.{i}.upsamplers.0.conv"


def original_layers(first: str, path: str, block: nn.Module) -> Iterator[tuple[str, str]]:
    """As `original_places`, for the resnets and attentions of one block, whose first layer is at the place `first`."""
    kind, number = first.split(".")
    for j in range(len(block.resnets)):
        yield f"{kind}.{int(number) + j}.0", f"{path}.resnets.{j}"
        if hasattr(block, "attentions"):
            yield f"{kind}.{int(number) + j}.1", f"{path}.attentions.{j}"


def read_lora(file: Path) -> Lora:
    """Read a LoRA's part for the UNet; raises DataError for a file that is none, is broken, or is of another kind."""
    read_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            unet_names = [name for name in names if not name.startswith(TEXT_PREFIXES)]
            check_kind(file, names, unet_names)
            tensors = {name: opened.get_tensor(name) for name in unet_names}
            config = adapter_config(file, opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise broken(file, f"it cannot be read ({error}).") from error
    return Lora(file, layers_of(file, tensors, config), has_text=len(unet_names) < len(names))


def check_kind(file: Path, names: list[str], unet_names: list[str]) -> None:
    """Raise DataError unless the UNet's tensors, and there are some, are low-rank factors and their alphas alone."""
    if names and not unet_names:
        reason = f"{file} changes the text encoders alone, and LoRA is used for the UNet only."
        raise DataError(reason, "Use another LoRA.")
    other = [name for name in unet_names if not (FACTOR.fullmatch(name) or name.endswith(ALPHA))]
    if len(other) == len(unet_names) and not any(kind in name for name in other for kind in OTHER_KINDS):
        holds = f"it holds {other[0]}" if other else "it holds no factors"
        raise DataError(f"{file} is no LoRA: {holds}.", "Name a LoRA's safetensors file.")
    if other:
        raise unknown_kind(file, f"it holds {other[0]}")


def layers_of(file: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Factors]:
    """Layer, as the file names it, -> its factors; raises DataError where they are broken."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, part = part_of(name)
        is_number = tensor.is_floating_point() or part == ALPHA  # some write alphas as integers
        if not is_number or not bool(tensor.float().isfinite().all()):
            raise broken(file, f"{name} is not all finite numbers.")
        layers.setdefault(layer, {})[part] = tensor
    return {layer: factors_of(file, layer, parts, config) for layer, parts in layers.items()}


def part_of(name: str) -> tuple[str, str]:
    """A tensor's name -> its layer, and which part of it the tensor is: `down`, `up` or `.alpha`."""
    match = FACTOR.fullmatch(name)
    if match is None:
        return name.removesuffix(ALPHA), ALPHA
    return match["layer"], SIDES.get(match["side"], match["side"])


def factors_of(file: Path, layer: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Factors:
    """The factors of one layer from its parts; raises DataError where they make none."""
    down, up, alpha = (parts.get(part) for part in ("down", "up", ALPHA))
    if down is None or up is None:
        raise broken(file, f"{layer} lacks one of its two factors.")
    rank = math.prod(up.shape[1:])
    if min(up.dim(), down.dim()) < 2 or not rank or rank != down.shape[0]:
        raise broken(file, f"the factors of {layer} are {tuple(up.shape)} and {tuple(down.shape)}.")
    if alpha is not None and alpha.numel() != 1:
        raise broken(file, f"the alpha of {layer} is no number.")
    return Factors(down, up, configured_scale(layer, rank, config) if alpha is None else alpha.item() / rank)


def adapter_config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What diffusers wrote of PEFT's LoraConfig for the UNet into the file's header, {} where nothing is; DataError."""
    try:
        config = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        found = {key.removeprefix("unet."): value for key, value in config.items() if key.startswith("unet.")}
        patterns = found.get("alpha_pattern") or {}
        if not all(math.isfinite(alpha) for alpha in (*patterns.values(), found.get("lora_alpha", 1))):
            raise ValueError("an alpha is not finite")
        for pattern in patterns:
            re.compile(pattern)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise broken(file, f"its header says nonsense ({error}).") from error
    if found.get("use_dora"):
        raise unknown_kind(file, "its header says DoRA")
    return found


def broken(file: Path, what: str) -> DataError:
    """The error for a LoRA with which nothing can be done."""
    return DataError(f"The LoRA {file} is broken: {what}", "Download it again, or use another one.")


def unknown_kind(file: Path, why: str) -> DataError:
    """The error for a LoRA that is more than two factors and an alpha for each layer."""
    way_out = "Use a plain LoRA: DoRA, LoHa, LoKr and other kinds are not read."
    return DataError(f"The LoRA {file} is of an unknown kind: {why}.", way_out)


def configured_scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732), by PEFT's config; 1 where it says nothing."""
    from peft.utils.other import get_pattern_key

    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas, layer.removeprefix("unet.")), config.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
