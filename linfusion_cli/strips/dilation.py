"""Convolutions at any dilation, also those whose missing rows somebody else supplies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def skip_row_padding(network: nn.Module, dilation: int = 1) -> Iterator[None]:
    """Within the context every convolution has this dilation and pads columns only: its caller supplies the rows.

    Convolutions inside LoRA layers are convolutions of the network too. On leaving, all are as they were.
    """
    with _changed(network, dilation, pads_rows=False):
        yield


@contextmanager
def dilate(network: nn.Module, dilation: int) -> Iterator[None]:
    """Within the context every convolution has its dilation and padding times `dilation`; then all are as they were."""
    with _changed(network, dilation, pads_rows=True):
        yield


@contextmanager
def _changed(network: nn.Module, dilation: int, pads_rows: bool) -> Iterator[None]:
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    before = [(module.dilation, module.padding) for module in convolutions]
    try:
        for module in convolutions:
            rows, columns = module.padding
            module.dilation = (dilation, dilation)
            module.padding = (dilation * rows if pads_rows else 0, dilation * columns)
        yield
    finally:
        for module, (old_dilation, padding) in zip(convolutions, before, strict=True):
            module.dilation, module.padding = old_dilation, padding


def halo_rows(convolution: nn.Conv2d, dilation: int) -> int:
    """How many rows beyond its own an output row looks at, up and down: `dilation` for a 3x3 kernel, 0 for 1x1."""
    return dilation * (convolution.kernel_size[0] // 2)


def inner(module: nn.Module) -> nn.Module:
    """The layer itself, where LoRA has been wrapped around it."""
    return inner(module.base_layer) if hasattr(module, "base_layer") else module
