"""Where maps wait between operations: on the device, or in pinned host memory, from where rows travel ahead of need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from linfusion_cli.hardware.allocator import segments
from linfusion_cli.strips.copies import Copies, Upload
from linfusion_cli.strips.pinned import PinnedMemory, map_memory
from linfusion_cli.strips.stats import Moments

Place = Literal["device", "skips", "host"]
PLACES: tuple[Place, ...] = get_args(Place)
TRIM_BYTES = 128 << 20  # from this size on, a map has native segments of its own, which take as long as it is written


class Shaped:
    """What has the shape (B, H, W, C) of a map."""

    shape: tuple[int, int, int, int]

    @property
    def height(self) -> int:
        return self.shape[1]

    @property
    def width(self) -> int:
        return self.shape[2]

    @property
    def channels(self) -> int:
        return self.shape[3]


class Map(Shaped):
    """A map [B, H, W, C] on the device. Rows are read and written in place; a read is a view, not a copy.

    `moments` are set by whoever has written the whole map. No operation may write over a map that is `kept`: a skip
    connection that is still to be read, or a map that is in no memory.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.moments: Moments | None = None
        self.kept = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return tuple(self.tensor.shape)

    def release(self) -> None:
        """The skip connection is about to be read for the last time."""
        self.kept = False

    def flattened(self) -> Map:
        """The same memory as a map of one pixel a row, [B, H · W, 1, C]."""
        return Map(self.tensor.flatten(1, 2).unsqueeze(2))

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows [B, bottom - top, W, C] on the device."""
        return self.tensor[:, top:bottom]

    def pixels(self, images: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Single pixels [N, C] on the device, by the place of each."""
        places = torch.tensor([images, rows, columns]).to(self.tensor.device)
        return self.tensor[tuple(places)]

    def read_alone(self, top: int, bottom: int) -> Tensor:
        """As `read`, where the rows that follow are not the next to be read."""
        return self.read(top, bottom)

    def write(self, top: int, rows: Tensor) -> None:
        target = self.tensor[:, top : top + rows.shape[1]]
        if target.data_ptr() != rows.data_ptr():  # a view of itself that was changed in place is there already
            target.copy_(rows)


@dataclass
class Written:
    """The last download into a map; all views of its memory share it."""

    event: torch.cuda.Event | None = None


class HostMap(Map):
    """A map in host memory, pinned if the device is a CUDA card.

    Rows are read from top to bottom nearly always, so each read starts the upload of the rows that follow.
    """

    def __init__(self, tensor: Tensor, copies: Copies, written: Written | None = None):
        super().__init__(tensor)
        self._copies, self._written = copies, written or Written()
        self._ahead: Upload | None = None

    def flattened(self) -> Map:
        return HostMap(self.tensor.flatten(1, 2).unsqueeze(2), self._copies, self._written)

    def release(self) -> None:
        """As for any map; what it was copied from on the device, long ago, no longer waits for that."""
        super().release()
        self._copies.settle()

    def read(self, top: int, bottom: int) -> Tensor:
        ahead = self._ahead
        if ahead is None or top != ahead.top or bottom > ahead.bottom:
            self._forget_ahead()
            ahead = self._upload(top, bottom)
        following = min(2 * bottom - top, self.height)
        self._ahead = self._upload(bottom, following) if bottom < following else None
        return self._copies.arrived(ahead)[:, : bottom - top]

    def read_alone(self, top: int, bottom: int) -> Tensor:
        """As `read`, without the upload of the rows that follow."""
        self._forget_ahead()
        return self._copies.arrived(self._upload(top, bottom))

    def pixels(self, images: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Only they are copied, not the rows that they lie in; waits until the map is written."""
        if self._written.event is not None:
            self._written.event.synchronize()
        found = self.tensor[torch.tensor(images), torch.tensor(rows), torch.tensor(columns)]
        return self._copies.to_device(found, self.tensor.dtype)

    def write(self, top: int, rows: Tensor) -> None:
        bottom = top + rows.shape[1]
        if self._ahead and top < self._ahead.bottom and bottom > self._ahead.top:
            self._forget_ahead()  # they were read too early
        self._written.event = self._copies.down(rows, self.tensor[:, top:bottom])

    def _upload(self, top: int, bottom: int) -> Upload:
        return self._copies.up(top, bottom, self.tensor[:, top:bottom], self._written.event)

    def _forget_ahead(self) -> None:
        if self._ahead:
            self._copies.arrived(self._ahead)  # or the copy would still write to memory that serves others by then
        self._ahead = None

    def __del__(self) -> None:
        self._forget_ahead()


class Storage:
    """Makes maps: all on the device, skip connections on the host, or all on the host.

    `pinned` is where those on the host lie, if the device is a CUDA card.
    """

    def __init__(self, place: Place, device: torch.device, dtype: torch.dtype, pinned: PinnedMemory | None = None):
        self.place, self.device, self.dtype = place, device, dtype
        self.copies = Copies(device, pinned)

    def further_out(self) -> Storage | None:
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

    def new(self, batch: int, height: int, width: int, channels: int) -> Map:
        """A map to be written by the next operation."""
        shape = (batch, height, width, channels)
        return self._on_host(shape) if self.place == "host" else self._on_device(shape)

    def new_waiting(self, batch: int, height: int, width: int, channels: int) -> Map:
        """A map to be written, and to wait where skip connections do."""
        shape = (batch, height, width, channels)
        return self._on_device(shape) if self.place == "device" else self._on_host(shape)

    def keep(self, source: Map) -> Map:
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

    def _on_device(self, shape: tuple[int, ...]) -> Map:
        if self.device.type == "cpu":
            return Map(mapped(shape, self.dtype))
        if math.prod(shape) * self.dtype.itemsize >= TRIM_BYTES and segments() == "native":
            self.trim()
        return Map(torch.empty(shape, dtype=self.dtype, device=self.device))

    def _on_host(self, shape: tuple[int, ...]) -> HostMap:
        if self.device.type == "cpu":
            return HostMap(mapped(shape, self.dtype), self.copies)
        return HostMap(self.copies.pinned.empty(shape, self.dtype), self.copies)


def mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in a memory mapping of its own, which goes back to the system when the tensor goes.

    In the C library's heap, maps would leave holes between the strips' small tensors, a third of the peak in all.
    Large pages save the faults of writing to fresh memory. Raises MemoryError.
    """
    return torch.frombuffer(map_memory(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
