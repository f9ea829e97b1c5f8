"""Put linear attention in the place of a UNet's self-attention, and take it out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


def self_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of every `attn1`, in the order of `named_modules()` (down, up, mid): that of the weights file."""
    return {path: module for path, module in unet.named_modules() if path.split(".")[-1] == "attn1"}


@contextmanager
def mounted(unet: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Within the context `unet` has `modules` at their paths; afterwards it has the very modules it had before."""
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
