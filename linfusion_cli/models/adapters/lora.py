"""LoRA: low-rank updates, merged into the weights of the UNet and the text encoders after loading.

    W += weight · alpha / rank · up @ down        down [rank, in], up [out, rank]; arXiv 2106.09685, section 4.1

A convolution [out, in, k, k] has down [rank, in, k, k] and up [out, rank, 1, 1]. Files use the layer names of diffusers
and PEFT (`unet.mid_block.attentions.0.proj_in.lora_A.weight`) or of kohya-ss (`lora_unet_` and underscores instead of
dots), both also with the module names of the original SDXL code (`middle_block.1.proj_in`). Names are looked up, with
underscores instead of dots, in a table built from the network. The converter of diffusers instead replaces underscores
by dots, corrects known names, and ignores alphas outside of kohya-ss files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from linfusion_cli.core.errors import DataError
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.models.adapters.lora_file import NETWORK_PREFIX, UNET_PART, Factors, Lora, read_lora

OTHER_FAMILY_HINT = "Use a LoRA for the family of this model."
ORIGINAL_TOP_LEVEL_NAMES = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
ORIGINAL_RESNET_NAMES = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
TEXT_MODEL_PREFIX = "text_model."  # removed from newer versions of CLIPTextModel; files can have it
OLD_ATTENTION_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True)
class MergeCounts:
    """Number of layers that a LoRA changed in the UNet, and in linear attention."""

    layers: int
    linear_layers: int


@torch.no_grad()
def merge_lora(
    unet: UNet2DConditionModel, linear: Mapping[str, LinearAttention], file: Path, weight: float
) -> MergeCounts:
    """Add the LoRA in `file`, times `weight`, to the weights of the UNet and of linear attention, in place.

    `linear` maps UNet paths to modules, which must not be mounted: each gets the update of the `attn1` that it
    replaces. Sums are computed in fp32 and rounded once. Raise DataError, with unchanged weights, if the file is not a
    LoRA, is of an unsupported kind, or does not fit.
    """
    layers = match_layers(read_lora(file, UNET_PART), unet, build_layer_paths(unet))
    linear_layers = collect_linear_layers(linear)
    for path, factors in layers.items():
        factors.add_to(get_layer_weight(unet, path), weight)
        if path in linear_layers:
            factors.add_to(linear_layers[path].weight, weight)
    return MergeCounts(len(layers), len(layers.keys() & linear_layers.keys()))


@torch.no_grad()
def merge_text_lora(encoder: PreTrainedModel, part: str, file: Path, weight: float) -> int:
    """Merge like `merge_lora` into the text encoder `part` of the model, and return the number of changed layers."""
    layers = match_layers(read_lora(file, part), encoder, build_text_layer_paths(encoder))
    for path, factors in layers.items():
        factors.add_to(get_layer_weight(encoder, path), weight)
    return len(layers)


def collect_linear_layers(linear: Mapping[str, LinearAttention]) -> dict[str, nn.Linear]:
    """Return UNet path to layer for the projections of linear attention, which replace those of original attention."""
    names = ("to_q", "to_k", "to_v", "to_out.0")
    modules = {f"{path}.{name}": module.get_submodule(name) for path, module in linear.items() for name in names}
    return cast(dict[str, nn.Linear], modules)


def get_layer_weight(network: nn.Module, path: str) -> Tensor:
    """Return the weight of the linear layer or convolution at `path`."""
    return cast(Tensor, network.get_submodule(path).weight)


def match_layers(lora: Lora, network: nn.Module, paths: Mapping[str, str]) -> dict[str, Factors]:
    """Return path to factors; raise DataError for the first layer that `network` lacks or has with another shape.

    `paths` maps all names of each layer, with underscores instead of dots, to its path.
    """
    matched: dict[str, Factors] = {}
    for name, factors in lora.layers.items():
        key = normalize_layer_name(name)
        path = paths.get(key)
        shape = None if path is None else tuple(get_layer_weight(network, path).shape)
        if path is None or shape is None or drop_unit_kernel(shape) != drop_unit_kernel(factors.shape):
            reason = f"{name} is {factors.shape} in the file, but {shape or 'missing'} in the model."
            raise DataError(f"The LoRA {lora.file} does not fit the model: {reason}", OTHER_FAMILY_HINT)
        # Some files have a layer under both names: the name of diffusers has priority, as in diffusers.
        if path not in matched or key == path.replace(".", "_"):
            matched[path] = factors
    return matched


def drop_unit_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return [out, in] for [out, in, 1, 1]: families have linear layers or equivalent 1 x 1 convolutions."""
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape


def normalize_layer_name(name: str) -> str:
    """Return the lookup key of a layer name: without the prefix and without `.processor.` of old diffusers files."""
    name = NETWORK_PREFIX.sub("", name)
    if ".processor." in name:
        name = re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))
    return name.replace(".", "_")


def build_layer_paths(unet: UNet2DConditionModel) -> dict[str, str]:
    """Return name to UNet path of every layer, for diffusers and original names, with underscores instead of dots."""
    paths, blocks = find_weight_layers(unet), dict(unet.named_modules())
    names = {original: path for original, path in ORIGINAL_TOP_LEVEL_NAMES.items() if path in paths}
    for original, path in list_original_names(unet):
        for layer in find_weight_layers(blocks[path]) if path in blocks else ():  # some small SDXLs have no mid block
            names[f"{original}.{ORIGINAL_RESNET_NAMES.get(layer, layer)}".rstrip(".")] = f"{path}.{layer}".rstrip(".")
    names |= {path: path for path in paths}
    return {name.replace(".", "_"): path for name, path in names.items()}


def build_text_layer_paths(encoder: PreTrainedModel) -> dict[str, str]:
    """Return name to path of every layer of a text encoder: with and without `text_model`, by current and old names."""
    names: dict[str, str] = {}
    for path in find_weight_layers(encoder):
        plain = path.removeprefix(TEXT_MODEL_PREFIX)
        block, _, layer = plain.rpartition(".")
        for name in (plain, f"{block}.{OLD_ATTENTION_NAMES.get(layer, layer)}".lstrip(".")):
            names |= {name: path, TEXT_MODEL_PREFIX + name: path}
    return {name.replace(".", "_"): path for name, path in names.items()}


def find_weight_layers(module: nn.Module) -> list[str]:
    """Return the paths of the linear layers and convolutions in `module`; "" is `module` itself."""
    return [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def list_original_names(unet: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    """Yield original and diffusers name of every block, e.g. input_blocks.4.1 and down_blocks.1.attentions.0."""
    index = 1  # input_blocks.0 is conv_in
    for i, block in enumerate(unet.down_blocks):
        yield from list_block_names("input_blocks", index, f"down_blocks.{i}", block)
        index += len(cast(nn.ModuleList, block.resnets))
        if block.downsamplers:
            yield f"input_blocks.{index}.0.op", f"down_blocks.{i}.downsamplers.0.conv"
            index += 1
    for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{i}", f"mid_block.{name}"
    index = 0
    for i, block in enumerate(unet.up_blocks):
        yield from list_block_names("output_blocks", index, f"up_blocks.{i}", block)
        index += len(cast(nn.ModuleList, block.resnets))
        if block.upsamplers:  # the last module in the output block of the last layer
            number = 2 if hasattr(block, "attentions") else 1
            yield f"output_blocks.{index - 1}.{number}.conv", f"up_blocks.{i}.upsamplers.0.conv"


def list_block_names(original: str, first: int, path: str, block: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of the resnets and attentions of one block; `original`.`first` is its first layer."""
    for j in range(len(cast(nn.ModuleList, block.resnets))):
        yield f"{original}.{first + j}.0", f"{path}.resnets.{j}"
        if hasattr(block, "attentions"):
            yield f"{original}.{first + j}.1", f"{path}.attentions.{j}"
