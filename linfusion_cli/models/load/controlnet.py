"""Read ControlNets, and give them the linear attention of the UNet that they were made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from torch import nn

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions
from linfusion_cli.models.files.layout import Part
from linfusion_cli.models.load.networks import load_meta, load_part
from linfusion_cli.models.locate.controlnet import is_union

ControlNet = ControlNetModel | ControlNetUnionModel


@dataclass(frozen=True)
class LoadedControlNet:
    """A ControlNet, and the linear attention that can be mounted in it."""

    net: ControlNet
    linear: dict[str, LinearAttention]

    @staticmethod
    def load(folder: Path, linear: Mapping[str, LinearAttention], dtype: torch.dtype) -> LoadedControlNet:
        """The ControlNet in `folder`, on the CPU; `linear` is the UNet's, by path. Errors as in `load_part`."""
        net = load_part(read_controlnet_class(folder), Part(folder), dtype, torch.device("cpu"))
        return LoadedControlNet(net, build_linear_attention(net, linear))

    @staticmethod
    def load_meta(folder: Path, linear: Mapping[str, LinearAttention]) -> LoadedControlNet:
        """As `load`, without weights: on the meta device, from the config alone."""
        net = load_meta(read_controlnet_class(folder), Part(folder))
        return LoadedControlNet(net, build_linear_attention(net, linear))


def read_controlnet_class(folder: Path) -> type[ControlNet]:
    return ControlNetUnionModel if is_union(folder) else ControlNetModel


def build_linear_attention(net: ControlNet, linear: Mapping[str, LinearAttention]) -> dict[str, LinearAttention]:
    """Linear attention for the paths of `net` that the UNet has too, with the projections of `net`.

    LinFusion's weights are for a UNet, of whose encoder a ControlNet is a copy trained further: f_q and f_k are the
    UNet's own modules, which both share, and all else is the ControlNet's.
    """
    return {
        path: build_shared_module(module, linear[path])
        for path, module in find_self_attentions(net).items()
        if path in linear and linear[path].to_q.in_features == module.to_q.in_features
    }


def build_shared_module(attention: nn.Module, linear: LinearAttention) -> LinearAttention:
    """`linear` with the projections and the heads of a ControlNet's own `attention`."""
    made = LinearAttention(linear.to_q.in_features, attention.heads, mid_dim=-1)
    made.to_q, made.to_k, made.to_v = attention.to_q, attention.to_k, attention.to_v
    made.to_out = nn.ModuleList([attention.to_out[0]])
    made.to_q_, made.to_k_ = linear.to_q_, linear.to_k_
    return made.eval().requires_grad_(False)
