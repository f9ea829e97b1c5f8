"""Load ControlNets, and build linear attention for them from the UNet's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions
from linfusion_cli.models.files.layout import Part
from linfusion_cli.models.load.networks import load_meta, load_part
from linfusion_cli.models.locate.controlnet import is_union

ControlNet = ControlNetModel | ControlNetUnionModel


@dataclass(frozen=True)
class LoadedControlNet:
    """A ControlNet and the linear-attention modules that can be mounted in it, by path."""

    net: ControlNet
    linear: dict[str, LinearAttention]

    @staticmethod
    def load(folder: Path, linear: Mapping[str, LinearAttention], dtype: torch.dtype) -> LoadedControlNet:
        """Load the ControlNet in `folder` on the CPU; `linear` is the UNet's. Errors as in `load_part`."""
        net = load_part(read_controlnet_class(folder), Part(folder), dtype, torch.device("cpu"))
        return LoadedControlNet(net, build_linear_attention(net, linear))

    @staticmethod
    def load_meta(folder: Path, linear: Mapping[str, LinearAttention]) -> LoadedControlNet:
        """Build the ControlNet in `folder` from its config on the meta device, without weights."""
        net = load_meta(read_controlnet_class(folder), Part(folder))
        return LoadedControlNet(net, build_linear_attention(net, linear))


def read_controlnet_class(folder: Path) -> type[ControlNet]:
    """Return the class of the ControlNet in `folder`."""
    return ControlNetUnionModel if is_union(folder) else ControlNetModel


def build_linear_attention(net: ControlNet, linear: Mapping[str, LinearAttention]) -> dict[str, LinearAttention]:
    """Build linear attention with the projections of `net`, for all paths that the UNet has as well.

    A ControlNet is a fine-tuned copy of the UNet's encoder, so it can use LinFusion's f_q and f_k for the UNet. These
    modules are shared; the projections are those of the ControlNet.
    """
    return {
        path: build_shared_module(cast(Attention, module), linear[path])
        for path, module in find_self_attentions(net).items()
        if path in linear and linear[path].to_q.in_features == cast(nn.Linear, module.to_q).in_features
    }


def build_shared_module(attention: Attention, linear: LinearAttention) -> LinearAttention:
    """Combine f_q and f_k of `linear` with the projections and heads of the ControlNet's `attention`."""
    projections = attention.to_q, attention.to_k, attention.to_v
    module = LinearAttention(linear.to_q.in_features, attention.heads, mid_dim=-1)
    module.to_q, module.to_k, module.to_v = (cast(nn.Linear, layer) for layer in projections)
    module.to_out = nn.ModuleList([cast(nn.ModuleList, attention.to_out)[0]])
    module.to_q_, module.to_k_ = linear.to_q_, linear.to_k_
    return module.eval().requires_grad_(False)
