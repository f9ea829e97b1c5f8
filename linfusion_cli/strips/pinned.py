"""Pinned host memory in exact sizes: maps are suballocated from one region registered with CUDA.

torch's pinned memory cache rounds to powers of two and never frees a block. Here the plan and the run place maps by
the same rule, so the region has exactly the planned size.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from bisect import bisect_left
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 4096  # bytes; maps are page-aligned
HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable


class AddressSpace:
    """First-fit allocator: places each block at the lowest address where it fits. `peak` is the highest end so far."""

    def __init__(self, size: int | None = None):
        self._free: list[tuple[int, float]] = [(0, math.inf if size is None else size)]  # (begin, end), sorted
        self._used: dict[int, int] = {}
        self.peak = 0

    @property
    def is_empty(self) -> bool:
        """Whether no block is allocated."""
        return not self._used

    def allocate(self, size: int) -> int | None:
        """Return the offset of a new block of `size` bytes, None if there is no room."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        for i, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                self._free[i : i + 1] = [(begin + size, end)] if end - begin > size else []
                self._used[begin] = size
                self.peak = max(self.peak, begin + size)
                return begin
        return None

    def free(self, offset: int) -> None:
        """Free the block at `offset` and merge it with free neighbours."""
        begin, end = offset, offset + self._used.pop(offset)
        i = bisect_left(self._free, (begin,))
        if i < len(self._free) and self._free[i][0] == end:
            end = self._free.pop(i)[1]
        if i and self._free[i - 1][1] == begin:
            i -= 1
            begin = self._free.pop(i)[0]
        self._free.insert(i, (begin, end))


class PinnedRegion:
    """Registered memory with its address space, returned to the system when it is no longer referenced."""

    def __init__(self, device: torch.device, size: int):
        self.space, self.size = AddressSpace(size), size
        memory = map_memory(size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        pin(self._address, size)
        finalizer = weakref.finalize(self, unpin, device, self._address, memory)
        finalizer.atexit = False  # at exit the driver may already be unloaded, and frees the memory itself

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor in the block at `offset`, which is freed with the tensor's storage."""
        block = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(self._address + offset)
        weakref.finalize(block, self.free, offset).atexit = False
        return torch.frombuffer(block, dtype=dtype).view(shape)

    def free(self, offset: int) -> None:
        """Free the block at `offset`."""
        self.space.free(offset)


class PinnedMemory:
    """Allocates tensors in pinned memory: in one region of `expected` bytes, then in a separate region for each tensor.

    Freed memory is reused immediately. This is safe if all reads and writes of the tensors use the streams of one
    `Copies` object, which orders them after the compute stream.
    """

    def __init__(self, device: torch.device, expected: int = 0):
        self._device, self._expected = device, expected
        self._regions: list[PinnedRegion] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor. Raise MemoryError if memory cannot be allocated or pinned."""
        size = math.prod(shape) * dtype.itemsize
        for region in self._regions:
            offset = region.space.allocate(size)
            if offset is not None:
                return region.tensor(offset, shape, dtype)
        self._regions = [region for region in self._regions if not region.space.is_empty]
        remaining = self._expected - sum(region.size for region in self._regions)
        region = PinnedRegion(self._device, -(-max(size, remaining) // ALIGNMENT) * ALIGNMENT)
        self._regions.append(region)
        offset = region.space.allocate(size)
        assert offset is not None  # the region is new, and at least as large
        return region.tensor(offset, shape, dtype)


def map_memory(size: int) -> mmap.mmap:
    """Return a new anonymous mapping of zeros, with huge pages if the system has them. Raise MemoryError."""
    try:
        memory = mmap.mmap(-1, size)
    except OSError as error:
        raise MemoryError(f"cannot map {size} bytes of memory") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # not supported by every kernel
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def pin(address: int, size: int) -> None:
    """Pin memory. Raise MemoryError if the system has no more memory to pin or a limit does not allow it."""
    runtime: Any = torch.cuda.cudart()  # typed as optional, but raises if CUDA is missing
    result = int(runtime.cudaHostRegister(address, size, HOST_REGISTER_PORTABLE))
    if result:
        raise MemoryError(f"{size} bytes of host memory cannot be pinned (CUDA error {result})")


def unpin(device: torch.device, address: int, memory: mmap.mmap) -> None:
    """Wait for pending copies, then unpin the memory. Errors of a lost device are ignored: it has no pending copies."""
    with suppress(RuntimeError):
        torch.cuda.synchronize(device)
        runtime: Any = torch.cuda.cudart()
        runtime.cudaHostUnregister(address)
    del memory
