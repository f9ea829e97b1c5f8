"""Allocate feature maps on the device or in pinned host memory."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from linfusion_cli.hardware.allocator import detect_segments
from linfusion_cli.strips.copies import Copies
from linfusion_cli.strips.feature_map import FeatureMap, HostFeatureMap
from linfusion_cli.strips.pinned import PinnedMemory, map_memory

Place = Literal["device", "skips", "host"]
PLACES: tuple[Place, ...] = get_args(Place)
# Maps of at least this size get separate native segments; allocating one takes as long as writing the map.
TRIM_BYTES = 128 << 20


class Storage:
    """Creates maps: all on the device, only skip connections on the host ("skips"), or all on the host.

    `pinned` provides the host memory if the device is a CUDA GPU.
    """

    def __init__(self, place: Place, device: torch.device, dtype: torch.dtype, pinned: PinnedMemory | None = None):
        self.place, self.device, self.dtype = place, device, dtype
        self.copies = Copies(device, pinned)

    def move_to_host(self) -> Storage | None:
        """Return a storage with more maps on the host, None if all are there already or the device is the CPU."""
        remaining = PLACES[PLACES.index(self.place) + 1 :]
        if not remaining or self.device.type == "cpu":
            return None
        return Storage(remaining[0], self.device, self.dtype, self.copies.pinned)

    def wait_downloads(self) -> None:
        """Release the device memory of pending downloads, after an operation failed."""
        self.copies.wait_downloads()

    def trim(self) -> None:
        """Return torch's cached device memory to the driver: larger maps do not fit into the freed blocks."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def new(self, batch: int, height: int, width: int, channels: int) -> FeatureMap:
        """Create a map that the next operation writes."""
        shape = (batch, height, width, channels)
        return self._on_host(shape) if self.place == "host" else self._on_device(shape)

    def new_skip(self, batch: int, height: int, width: int, channels: int) -> FeatureMap:
        """Create a map with the placement of skip connections."""
        shape = (batch, height, width, channels)
        return self._on_device(shape) if self.place == "device" else self._on_host(shape)

    def store_skip(self, source: FeatureMap) -> FeatureMap:
        """Return `source` as a skip connection: the map itself, or its copy on the host."""
        if source.is_read_only:
            return source
        if self.place == "skips":
            self.copies.wait_downloads()  # the previous copy overlapped with the computation of this map
            copy = self._on_host(source.shape)
            copy.write(0, source.read(0, source.height))
            copy.moments = source.moments
            return copy
        source.is_read_only = True
        return source

    def _on_device(self, shape: tuple[int, ...]) -> FeatureMap:
        if self.device.type == "cpu":
            return FeatureMap(allocate_mapped(shape, self.dtype))
        if math.prod(shape) * self.dtype.itemsize >= TRIM_BYTES and detect_segments() == "native":
            self.trim()
        return FeatureMap(torch.empty(shape, dtype=self.dtype, device=self.device))

    def _on_host(self, shape: tuple[int, ...]) -> HostFeatureMap:
        if self.device.type == "cpu":
            return HostFeatureMap(allocate_mapped(shape, self.dtype), self.copies)
        return HostFeatureMap(self.copies.pinned.empty(shape, self.dtype), self.copies)


def allocate_mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor in a separate memory mapping, which is unmapped with the tensor.

    On the C library's heap, maps would leave holes between the small tensors of strips, a third of the peak memory.
    Huge pages reduce page faults on the first write. Raise MemoryError if the mapping fails.
    """
    return torch.frombuffer(map_memory(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
