"""Where maps wait between operations: on the device, or in pinned host memory, from where rows travel ahead of need."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from linfusion_cli.hardware.allocator import segments
from linfusion_cli.strips.copies import Copies
from linfusion_cli.strips.feature_map import FeatureMap, HostFeatureMap
from linfusion_cli.strips.pinned import PinnedMemory, map_memory

Place = Literal["device", "skips", "host"]
PLACES: tuple[Place, ...] = get_args(Place)
TRIM_BYTES = 128 << 20  # from this size on, a map has native segments of its own, which take as long as it is written


class Storage:
    """Makes maps: all on the device, skip connections on the host, or all on the host.

    `pinned` is where those on the host lie, if the device is a CUDA card.
    """

    def __init__(self, place: Place, device: torch.device, dtype: torch.dtype, pinned: PinnedMemory | None = None):
        self.place, self.device, self.dtype = place, device, dtype
        self.copies = Copies(device, pinned)

    def move_to_host(self) -> Storage | None:
        """As this one with more of the maps on the host; None where all are there, or the host is the device."""
        outer = PLACES[PLACES.index(self.place) + 1 :]
        if not outer or self.device.type == "cpu":
            return None
        return Storage(outer[0], self.device, self.dtype, self.copies.pinned)

    def settle(self) -> None:
        """After an operation that failed: let go of the rows that were on their way to the host."""
        self.copies.settle()

    def trim(self) -> None:
        """Give the device back what torch keeps of freed maps: a larger one does not fit into the holes they left."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def new(self, batch: int, height: int, width: int, channels: int) -> FeatureMap:
        """A map to be written by the next operation."""
        shape = (batch, height, width, channels)
        return self._on_host(shape) if self.place == "host" else self._on_device(shape)

    def new_waiting(self, batch: int, height: int, width: int, channels: int) -> FeatureMap:
        """A map to be written, and to wait where skip connections do."""
        shape = (batch, height, width, channels)
        return self._on_device(shape) if self.place == "device" else self._on_host(shape)

    def keep(self, source: FeatureMap) -> FeatureMap:
        """`source` as a skip connection: itself, or its copy on the host."""
        if source.kept:
            return source
        if self.place == "skips":
            self.copies.settle()  # the one before was copied while this one was computed
            copy = self._on_host(source.shape)
            copy.write(0, source.read(0, source.height))
            copy.moments = source.moments
            return copy
        source.kept = True
        return source

    def _on_device(self, shape: tuple[int, ...]) -> FeatureMap:
        if self.device.type == "cpu":
            return FeatureMap(mapped(shape, self.dtype))
        if math.prod(shape) * self.dtype.itemsize >= TRIM_BYTES and segments() == "native":
            self.trim()
        return FeatureMap(torch.empty(shape, dtype=self.dtype, device=self.device))

    def _on_host(self, shape: tuple[int, ...]) -> HostFeatureMap:
        if self.device.type == "cpu":
            return HostFeatureMap(mapped(shape, self.dtype), self.copies)
        return HostFeatureMap(self.copies.pinned.empty(shape, self.dtype), self.copies)


def mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in a memory mapping of its own, which goes back to the system when the tensor goes.

    In the C library's heap, maps would leave holes between the strips' small tensors, a third of the peak in all.
    Large pages save the faults of writing to fresh memory. Raises MemoryError.
    """
    return torch.frombuffer(map_memory(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
