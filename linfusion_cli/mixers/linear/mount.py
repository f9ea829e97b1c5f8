"""Replace a UNet's self-attention by linear attention, temporarily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import nn


def find_self_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of every `attn1`, in the order of `named_modules()` (down, up, mid).

    Weights files have the same order.
    """
    return {path: module for path, module in unet.named_modules() if path.split(".")[-1] == "attn1"}


def get_attention_shape(attention: nn.Module) -> tuple[int, int]:
    """Return the numbers of channels and heads of a self-attention, diffusers' or linear."""
    return cast(nn.Linear, attention.to_q).in_features, cast(int, attention.heads)


@contextmanager
def mount_modules(unet: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Put `modules` at their paths in `unet` for this block, and restore the original modules afterwards."""
    originals = {path: unet.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            _replace(unet, path, module)
        yield unet
    finally:
        for path, module in originals.items():
            _replace(unet, path, module)


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
