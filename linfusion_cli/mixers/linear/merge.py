"""Combine LinFusion's weights, which were trained for a base model, with the projections of a fine-tune of that base.

    published   W                 those of the weights file: the fine-tune's self-attention is not used
    keep        W_own             those of the fine-tune, with LinFusion's f_q and f_k
    delta       W + W_own − W_base

W are the projections `to_q`, `to_k`, `to_v` and `to_out`. Adding the changes of a fine-tune to other weights of the
same base is task arithmetic, arXiv 2212.04089. The functions change LinFusion's modules only, never the UNet's own
attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from linfusion_cli.mixers.linear.linear import LinearAttention

PROJECTIONS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
ReadLayer = Callable[[str], Mapping[str, Tensor]]


@torch.no_grad()
def copy_own_projections(linear: Mapping[str, LinearAttention], own: Mapping[str, nn.Module]) -> None:
    """Copy the projections of `own` into the modules of `linear` (both UNet path -> module)."""
    for path, module in linear.items():
        for name in PROJECTIONS:
            module.get_parameter(name).copy_(own[path].get_parameter(name))


@torch.no_grad()
def add_difference(linear: Mapping[str, LinearAttention], own: Mapping[str, nn.Module], read_base: ReadLayer) -> None:
    """Add `own` − base to the projections of `linear` in place, in fp32 and rounded once (UNet path -> module).

    `read_base` returns the base model's projections for a UNet path: name -> tensor for all names in `PROJECTIONS`.
    """
    for path, module in linear.items():
        base = read_base(path)
        for name in PROJECTIONS:
            published, fine_tuned = module.get_parameter(name), own[path].get_parameter(name)
            # Rounded to the dtype of the fine-tune, equal weights differ by exactly 0. Subtracting 0 changes no bit;
            # adding it would turn -0 into 0.
            negated_difference = base[name].to(fine_tuned).float() - fine_tuned.float()
            published.copy_(published.float() - negated_difference)
