"""Random ControlNets of the real classes in the real formats, small enough to write in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from torch import nn

RANDOM_STD = 0.2  # of the weights that training begins with as zeros
CONV_SCALE = 3.0  # than convolutions are at first, of which seven would leave nothing of a picture but its mean
CONTROL_TYPE_COUNT = 6


def build_small_controlnet(unet: UNet2DConditionModel, seed: int = 0, **options: object) -> ControlNetModel:
    """A ControlNet that begins as `unet`, with projections and conditions that do something."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 6, 8, 8), **options)
    return randomize_zeros(net)


def build_small_union_controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetUnionModel:
    """The same of a union model, of the make of `small_xl_unet`."""
    torch.manual_seed(seed)
    shared = (
        "block_out_channels",
        "down_block_types",
        "layers_per_block",
        "transformer_layers_per_block",
        "attention_head_dim",
        "cross_attention_dim",
        "use_linear_projection",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
        "norm_num_groups",
    )
    net = ControlNetUnionModel(
        **{name: unet.config[name] for name in shared},
        conditioning_embedding_out_channels=(4, 6, 8, 8),
        num_control_type=CONTROL_TYPE_COUNT,
        num_trans_channel=unet.config.block_out_channels[0],
        num_trans_head=2,
        num_proj_channel=unet.config.block_out_channels[0],
    )
    return randomize_zeros(net)


def randomize_zeros(net: nn.Module) -> nn.Module:
    """`net` with random numbers where it has zeros, so that it changes what a UNet predicts."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=RANDOM_STD)
    for layer in net.controlnet_cond_embedding.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= CONV_SCALE
    return net.eval().requires_grad_(False)


def write_controlnet(folder: Path, net: nn.Module) -> Path:
    """`net` in diffusers' folder layout."""
    net.save_pretrained(folder)
    return folder
