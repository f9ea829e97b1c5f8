"""Pinned host memory in exact sizes: one region registered with CUDA, from which maps are cut.

torch's own cache of pinned memory rounds to powers of two and never gives a block back. Here a plan and the run that
follows it place maps by the same rule, so the region is exactly as large as the plan says.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from bisect import bisect_left
from contextlib import suppress

import torch
from torch import Tensor

ALIGNMENT = 4096  # bytes: maps begin at pages
PINNED_FOR_ALL = 1  # cudaHostRegisterPortable


class AddressSpace:
    """Places blocks in one range of addresses, each at the lowest where it fits; `peak` is the highest end so far."""

    def __init__(self, size: int | None = None):
        self._free: list[tuple[int, float]] = [(0, math.inf if size is None else size)]  # (begin, end), by address
        self._used: dict[int, int] = {}
        self.peak = 0

    @property
    def is_empty(self) -> bool:
        return not self._used

    def allocate(self, size: int) -> int | None:
        """The offset of a new block of `size` bytes; None where there is no room."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        for place, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                self._free[place : place + 1] = [(begin + size, end)] if end - begin > size else []
                self._used[begin] = size
                self.peak = max(self.peak, begin + size)
                return begin
        return None

    def free(self, offset: int) -> None:
        """Give the block at `offset` back, joined with free neighbours."""
        begin, end = offset, offset + self._used.pop(offset)
        place = bisect_left(self._free, (begin,))
        if place < len(self._free) and self._free[place][0] == end:
            end = self._free.pop(place)[1]
        if place and self._free[place - 1][1] == begin:
            place -= 1
            begin = self._free.pop(place)[0]
        self._free.insert(place, (begin, end))


class Region:
    """Registered memory with its address space; it goes back to the system when nothing refers to it."""

    def __init__(self, device: torch.device, size: int):
        self.space, self.size = AddressSpace(size), size
        memory = map_memory(size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        register(self._address, size)
        closing = weakref.finalize(self, unregister, device, self._address, memory)
        closing.atexit = False  # the driver may be gone by then, and takes it all the same

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in the block at `offset`, which is free again when the tensor's storage goes."""
        block = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(self._address + offset)
        weakref.finalize(block, self.free, offset).atexit = False
        return torch.frombuffer(block, dtype=dtype).view(shape)

    def free(self, offset: int) -> None:
        self.space.free(offset)


class PinnedMemory:
    """Tensors in pinned memory: in one region of the `expected` bytes, beyond that in a region for each.

    Memory that is freed serves the next tensor at once. That is safe where all that reads or writes tensors runs on
    the streams of one `Copies`, for which the computing stream waits: see there.
    """

    def __init__(self, device: torch.device, expected: int = 0):
        self._device, self._expected = device, expected
        self._regions: list[Region] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; raises MemoryError."""
        size = math.prod(shape) * dtype.itemsize
        for region in self._regions:
            offset = region.space.allocate(size)
            if offset is not None:
                return region.tensor(offset, shape, dtype)
        self._regions = [region for region in self._regions if not region.space.is_empty]
        left = self._expected - sum(region.size for region in self._regions)
        region = Region(self._device, -(-max(size, left) // ALIGNMENT) * ALIGNMENT)
        self._regions.append(region)
        return region.tensor(region.space.allocate(size), shape, dtype)


def map_memory(size: int) -> mmap.mmap:
    """Zeroed memory of its own, in large pages where the system has them; raises MemoryError."""
    try:
        memory = mmap.mmap(-1, size)
    except OSError as error:
        raise MemoryError(f"no memory for {size} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel may be built without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def register(address: int, size: int) -> None:
    """Pin memory; raises MemoryError, as the system has no more to pin or does not allow as much."""
    result = int(torch.cuda.cudart().cudaHostRegister(address, size, PINNED_FOR_ALL))
    if result:
        raise MemoryError(f"{size} bytes of host memory cannot be pinned (CUDA error {result})")


def unregister(device: torch.device, address: int, memory: mmap.mmap) -> None:
    """Wait for copies that may be under way, then give the memory back; a lost device has none under way."""
    with suppress(RuntimeError):
        torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaHostUnregister(address)
    del memory
