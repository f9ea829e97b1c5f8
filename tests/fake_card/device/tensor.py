"""Tensors without values: shapes, strides, dtypes and storages as on a CUDA device, based on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


class FakeTensor(Tensor):
    """A tensor without values on `device`: "cuda", or "cpu" for offloaded weights.

    `meta` has its shape and strides, and shares its storage with the other tensors of the same memory.
    """

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device) -> FakeTensor:
        fake = Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        fake.meta = meta
        return fake

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on a fake tensor outside a FakeCard")

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        """Required, like `__tensor_unflatten__`, by `Module.to`."""
        return ["meta"], self.device

    @staticmethod
    def __tensor_unflatten__(inner, device, outer_size, outer_stride) -> FakeTensor:
        return FakeTensor(inner["meta"], device)

    def data_ptr(self) -> int:
        """Return a number that is equal only for tensors that start at the same address of the same storage."""
        return (self.meta.untyped_storage()._cdata << 48) + self.meta.storage_offset() * self.meta.itemsize

    def __getitem__(self, index: Any) -> Tensor:
        """Convert a list of indices to a tensor here: torch does it without dispatch modes."""
        return super().__getitem__(torch.tensor(index).to(self.device) if isinstance(index, list) else index)

    def __repr__(self) -> str:
        return f"FakeTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo) -> FakeTensor:
        return FakeTensor(self.meta.clone(), self.device)


def to_meta(value: Any) -> Any:
    """Return `value` with a meta tensor in place of each tensor."""
    if type(value) is FakeTensor:
        return value.meta
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(to_meta(item) for item in value)
    return value


def find_tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from find_tensors(value)
