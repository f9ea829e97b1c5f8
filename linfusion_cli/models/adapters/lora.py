"""LoRA: a low-rank change of weights, added to those of the UNet and the text encoders once, after loading.

    W += weight · alpha / rank · up @ down        down [rank, in], up [out, rank]; arXiv 2106.09685, section 4.1

A convolution [out, in, k, k] has down [rank, in, k, k] and up [out, rank, 1, 1]. A file names its layers as diffusers
and PEFT do (`unet.mid_block.attentions.0.proj_in.lora_A.weight`), as kohya-ss does (`lora_unet_`, every dot an
underscore), or either with the places of the original SDXL code (`middle_block.1.proj_in`): with underscores for dots
all are looked up in one table, made from the network itself. diffusers' converter instead turns every underscore into
a dot and mends what it knows by name, and it leaves out alphas that are not kohya's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import PreTrainedModel

from linfusion_cli.core.errors import DataError
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.models.adapters.lora_file import NETWORK_PREFIX, UNET_PART, Factors, Lora, read_lora

OTHER_FAMILY_HINT = "Use a LoRA made for this model's family."
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
TEXT_MODEL_PREFIX = "text_model."  # gone from the newer CLIPTextModel; files have it, or not
OLD_ATTENTION_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True)
class MergeCounts:
    """How many of the UNet's layers a LoRA changed, and of linear attention's."""

    layers: int
    linear_layers: int


@torch.no_grad()
def merge_lora(
    unet: UNet2DConditionModel, linear: Mapping[str, LinearAttention], file: Path, weight: float
) -> MergeCounts:
    """Add the LoRA in `file`, times `weight`, to the UNet's weights and to those of linear attention, in place.

    `linear` has UNet path -> module, none of them mounted now: each is changed as the `attn1` whose place it takes.
    Sums are taken in fp32 and rounded once. Raises DataError, with all weights as they were, for a file that is no
    LoRA, is of another kind, or does not fit.
    """
    layers = match_layers(read_lora(file, UNET_PART), unet, build_layer_paths(unet))
    twins = collect_linear_layers(linear)
    for path, factors in layers.items():
        factors.add_to(unet.get_submodule(path).weight, weight)
        if path in twins:
            factors.add_to(twins[path].weight, weight)
    return MergeCounts(len(layers), len(layers.keys() & twins.keys()))


@torch.no_grad()
def merge_text_lora(encoder: PreTrainedModel, part: str, file: Path, weight: float) -> int:
    """As `merge_lora`, for the text encoder that is the model's `part`: how many of its layers were changed."""
    layers = match_layers(read_lora(file, part), encoder, build_text_layer_paths(encoder))
    for path, factors in layers.items():
        factors.add_to(encoder.get_submodule(path).weight, weight)
    return len(layers)


def collect_linear_layers(linear: Mapping[str, LinearAttention]) -> dict[str, nn.Module]:
    """UNet path -> layer, of the linear attentions' layers that stand where the original attention has one."""
    names = ("to_q", "to_k", "to_v", "to_out.0")
    return {f"{path}.{name}": module.get_submodule(name) for path, module in linear.items() for name in names}


def match_layers(lora: Lora, network: nn.Module, paths: Mapping[str, str]) -> dict[str, Factors]:
    """Path -> factors of all layers; raises DataError naming the first that `network` does not have like this.

    `paths` has each layer's path by all its names, with underscores for dots.
    """
    found: dict[str, Factors] = {}
    for name, factors in lora.layers.items():
        spelling = normalize_layer_name(name)
        path = paths.get(spelling)
        shape = None if path is None else tuple(network.get_submodule(path).weight.shape)
        if shape is None or drop_unit_kernel(shape) != drop_unit_kernel(factors.shape):
            reason = f"{name} is {factors.shape} in the file and {shape or 'no such layer'} in the model."
            raise DataError(f"The LoRA {lora.file} does not fit the model: {reason}", OTHER_FAMILY_HINT)
        # Some files hold a layer under both names: as in diffusers, its own is the one that counts.
        if path not in found or spelling == path.replace(".", "_"):
            found[path] = factors
    return found


def drop_unit_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out, in, 1, 1] -> [out, in]: one family has a 1 x 1 convolution where another has a linear layer."""
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape


def normalize_layer_name(name: str) -> str:
    """A layer's name as it is looked up: without the prefix, and without what diffusers' old layout put into it."""
    name = NETWORK_PREFIX.sub("", name)
    if ".processor." in name:
        name = re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))
    return name.replace(".", "_")


def build_layer_paths(unet: UNet2DConditionModel) -> dict[str, str]:
    """Name -> UNet path of every layer, by its own name and its original one, underscores for dots in both."""
    paths, blocks = find_weight_layers(unet), dict(unet.named_modules())
    names = {original: path for original, path in ORIGINAL_TOP_LEVEL_NAMES.items() if path in paths}
    for place, path in list_original_names(unet):
        for layer in find_weight_layers(blocks[path]) if path in blocks else ():  # some smaller SDXLs have no middle
            names[f"{place}.{ORIGINAL_RESNET_NAMES.get(layer, layer)}".rstrip(".")] = f"{path}.{layer}".rstrip(".")
    names |= {path: path for path in paths}
    return {name.replace(".", "_"): path for name, path in names.items()}


def build_text_layer_paths(encoder: PreTrainedModel) -> dict[str, str]:
    """As `layer_paths`, of a text encoder: with the level `text_model` and without, by today's names and the old."""
    names: dict[str, str] = {}
    for path in find_weight_layers(encoder):
        plain = path.removeprefix(TEXT_MODEL_PREFIX)
        block, _, layer = plain.rpartition(".")
        for spelling in (plain, f"{block}.{OLD_ATTENTION_NAMES.get(layer, layer)}".lstrip(".")):
            names |= {spelling: path, TEXT_MODEL_PREFIX + spelling: path}
    return {name.replace(".", "_"): path for name, path in names.items()}


def find_weight_layers(module: nn.Module) -> list[str]:
    """The paths of the linear layers and convolutions in `module`, "" for itself."""
    return [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def list_original_names(unet: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    """Place in the original SDXL code, and UNet path, of every block: input_blocks.4.1, down_blocks.1.attentions.0."""
    place = 1  # input_blocks.0 is conv_in
    for i, block in enumerate(unet.down_blocks):
        yield from list_block_names(f"input_blocks.{place}", f"down_blocks.{i}", block)
        place += len(block.resnets)
        if block.downsamplers:
            yield f"input_blocks.{place}.0.op", f"down_blocks.{i}.downsamplers.0.conv"
            place += 1
    for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{i}", f"mid_block.{name}"
    place = 0
    for i, block in enumerate(unet.up_blocks):
        yield from list_block_names(f"output_blocks.{place}", f"up_blocks.{i}", block)
        place += len(block.resnets)
        if block.upsamplers:  # the last thing in the place of the block's last layer
            number = 2 if hasattr(block, "attentions") else 1
            yield f"output_blocks.{place - 1}.{number}.conv", f"up_blocks.{i}.upsamplers.0.conv"


def list_block_names(first: str, path: str, block: nn.Module) -> Iterator[tuple[str, str]]:
    """As `original_places`, for the resnets and attentions of one block, whose first layer is at the place `first`."""
    kind, number = first.split(".")
    for j in range(len(block.resnets)):
        yield f"{kind}.{int(number) + j}.0", f"{path}.resnets.{j}"
        if hasattr(block, "attentions"):
            yield f"{kind}.{int(number) + j}.1", f"{path}.attentions.{j}"
