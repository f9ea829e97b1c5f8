"""What of a fine-tune goes into LinFusion's weights, which were made for its base and bring projections of their own.

    published   W                 as the weights file has them: the fine-tune's self-attention is not heard
    keep        W_own             the fine-tune's, with LinFusion's f_q and f_k
    delta       W + W_own − W_base

W are the projections `to_q`, `to_k`, `to_v` and `to_out`. Adding what a fine-tune changed to weights that come from
the same base is task arithmetic, arXiv 2212.04089. All are copies: the UNet's own attention stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from linfusion_cli.mixers.linear.linear import LinearAttention

PROJECTIONS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
ReadLayer = Callable[[str], Mapping[str, Tensor]]


@torch.no_grad()
def keep_own(linear: Mapping[str, LinearAttention], own: Mapping[str, nn.Module]) -> None:
    """Give the modules of `linear` (UNet path -> module) the projections of those of `own`, in place."""
    for path, module in linear.items():
        for name in PROJECTIONS:
            module.get_parameter(name).copy_(own[path].get_parameter(name))


@torch.no_grad()
def add_difference(linear: Mapping[str, LinearAttention], own: Mapping[str, nn.Module], base: ReadLayer) -> None:
    """Add `own` − base to the projections of `linear` (UNet path -> module), in place, in fp32 and rounded once.

    `base` reads the projections of one UNet path: name -> tensor, for every name of `PROJECTIONS`.
    """
    for path, module in linear.items():
        layer = base(path)
        for name in PROJECTIONS:
            published, ours = module.get_parameter(name), own[path].get_parameter(name)
            # Rounded as ours were, the base's give no difference where there is none; taking a zero away changes no
            # bit of any number, and adding it would turn -0 into 0.
            backwards = layer[name].to(ours).float() - ours.float()
            published.copy_(published.float() - backwards)
