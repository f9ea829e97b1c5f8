"""Small random ControlNets of the real classes in the real formats."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from torch import nn

RANDOM_STD = 0.2  # of weights that are initialized with zeros
CONV_SCALE = (
    3.0  # factor for the seven convolutions of the image embedding, which otherwise reduce the image to its mean
)
CONTROL_TYPE_COUNT = 6


def build_small_controlnet(unet: UNet2DConditionModel, seed: int = 0, **options: object) -> ControlNetModel:
    """Build a ControlNet from `unet` with non-zero projections and image embedding."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 6, 8, 8), **options)
    return randomize_zeros(net)


def build_small_union_controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetUnionModel:
    """Build a union ControlNet for `build_small_xl_unet`."""
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
    """Replace zero parameters by random numbers, otherwise the ControlNet has no effect."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=RANDOM_STD)
    for layer in net.controlnet_cond_embedding.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= CONV_SCALE
    return net.eval().requires_grad_(False)


def write_controlnet(folder: Path, net: nn.Module) -> Path:
    """Write `net` in diffusers' folder layout."""
    net.save_pretrained(folder)
    return folder
