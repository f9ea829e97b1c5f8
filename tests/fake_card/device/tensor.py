"""Tensors without numbers: shapes, strides, dtypes and storages as on a CUDA device, computed on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


class FakeTensor(Tensor):
    """A tensor on `device` ("cuda", or "cpu" for weights that wait there) whose numbers nobody knows.

    `meta` has its shape and strides, and shares storage with the other tensors on its memory.
    """

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device) -> FakeTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        made.meta = meta
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on a fake tensor outside of a FakeCard")

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        """With its counterpart, what `Module.to` needs to swap parameters for those on another device."""
        return ["meta"], self.device

    @staticmethod
    def __tensor_unflatten__(inner, device, outer_size, outer_stride) -> FakeTensor:
        return FakeTensor(inner["meta"], device)

    def data_ptr(self) -> int:
        """Equal for tensors that begin at one place of one memory, and for no others."""
        return (self.meta.untyped_storage()._cdata << 48) + self.meta.storage_offset() * self.meta.itemsize

    def __getitem__(self, index: Any) -> Tensor:
        """As torch, which makes a tensor of a list on the device, past all dispatch modes."""
        return super().__getitem__(torch.tensor(index).to(self.device) if isinstance(index, list) else index)

    def __repr__(self) -> str:
        return f"FakeTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo) -> FakeTensor:
        return FakeTensor(self.meta.clone(), self.device)


def to_meta(value: Any) -> Any:
    """`value` with meta tensors in the place of all tensors."""
    if type(value) is FakeTensor:
        return value.meta
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(to_meta(item) for item in value)
    return value


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
