"""Dilated convolutions, with or without padding of rows, and layers wrapped by LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn


@contextmanager
def skip_row_padding(network: nn.Module, dilation: int = 1) -> Iterator[None]:
    """Set the dilation of every convolution and pad only columns; the caller supplies the missing rows.

    This includes the convolutions inside LoRA layers. All settings are restored on exit.
    """
    with _override_convolutions(network, dilation, pads_rows=False):
        yield


@contextmanager
def dilate(network: nn.Module, dilation: int) -> Iterator[None]:
    """Multiply the dilation and padding of every convolution by `dilation`; restore them on exit."""
    with _override_convolutions(network, dilation, pads_rows=True):
        yield


@contextmanager
def _override_convolutions(network: nn.Module, dilation: int, pads_rows: bool) -> Iterator[None]:
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    original = [(module.dilation, module.padding) for module in convolutions]
    try:
        for module in convolutions:
            rows, columns = cast(tuple[int, int], module.padding)
            module.dilation = (dilation, dilation)
            module.padding = (dilation * rows if pads_rows else 0, dilation * columns)
        yield
    finally:
        for module, (original_dilation, padding) in zip(convolutions, original, strict=True):
            module.dilation, module.padding = original_dilation, padding


def halo_rows(convolution: nn.Conv2d, dilation: int) -> int:
    """Return the number of rows read above and below an output row: `dilation` for a 3x3 kernel, 0 for 1x1."""
    return dilation * (convolution.kernel_size[0] // 2)


def unwrap_lora(module: nn.Module) -> nn.Module:
    """Return the original layer if LoRA has wrapped `module`, else `module`."""
    base_layer = getattr(module, "base_layer", None)
    return module if base_layer is None else unwrap_lora(base_layer)


def unwrap_convolution(module: nn.Module) -> nn.Conv2d:
    """Return the original convolution, as `unwrap_lora` does."""
    return cast(nn.Conv2d, unwrap_lora(module))
