"""Where maps wait between operations: on the device, or in pinned host memory, from where rows travel ahead of need."""

from __future__ import annotations

import math
import mmap
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from linfusion_cli.strips.stats import Moments

Place = Literal["device", "skips", "host"]
PLACES: tuple[Place, ...] = get_args(Place)
DOWNLOADS = 2  # strips on their way to the host at a time: one being copied while the next is computed


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

    def write(self, top: int, rows: Tensor) -> None:
        target = self.tensor[:, top : top + rows.shape[1]]
        if target.data_ptr() != rows.data_ptr():  # a view of itself that was changed in place is there already
            target.copy_(rows)


class HostMap(Map):
    """A map in host memory, pinned if the device is a CUDA card.

    Rows are read from top to bottom nearly always, so each read starts the upload of the rows that follow. All copies
    run in order on one stream of their own: rows that were written arrive before they are read again.
    """

    def __init__(self, tensor: Tensor, copies: Copies):
        super().__init__(tensor)
        self._copies = copies
        self._ahead: Upload | None = None

    def flattened(self) -> Map:
        return HostMap(self.tensor.flatten(1, 2).unsqueeze(2), self._copies)

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

    def write(self, top: int, rows: Tensor) -> None:
        bottom = top + rows.shape[1]
        if self._ahead and top < self._ahead.bottom and bottom > self._ahead.top:
            self._forget_ahead()  # they were read too early
        self._copies.down(rows, self.tensor[:, top:bottom])

    def _upload(self, top: int, bottom: int) -> Upload:
        return Upload(top, bottom, *self._copies.up(self.tensor[:, top:bottom]))

    def _forget_ahead(self) -> None:
        if self._ahead:
            self._copies.arrived(self._ahead)  # or the copy would still write to memory that serves others by then
        self._ahead = None


@dataclass(frozen=True)
class Upload:
    """Rows [top, bottom) of a map under way to the device: where they will be, and the event of their arrival."""

    top: int
    bottom: int
    rows: Tensor
    event: torch.cuda.Event | None


class Copies:
    """Copies between host and device, on a stream of their own where the device is a CUDA card."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._going_down: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def up(self, rows: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Start to copy `rows` of the host to the device -> where they will be, and the event of their arrival."""
        if self._stream is None:
            return rows.clone(), None
        target = torch.empty(rows.shape, dtype=rows.dtype, device=self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # its memory may still be in use
        with torch.cuda.stream(self._stream):
            target.copy_(rows, non_blocking=True)
        return target, self._stream.record_event()

    def arrived(self, upload: Upload) -> Tensor:
        """The rows of `upload`: whatever is computed from now on finds them there."""
        if upload.event is not None:
            torch.cuda.current_stream(self.device).wait_event(upload.event)
        return upload.rows

    def down(self, rows: Tensor, target: Tensor) -> None:
        """Start to copy `rows` of the device to `target` on the host; few strips are under way at a time."""
        if self._stream is None:
            target.copy_(rows)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(rows, non_blocking=True)
        self._going_down.append((self._stream.record_event(), rows))
        self.settle(DOWNLOADS)

    def settle(self, remaining: int = 0) -> None:
        """Let all but `remaining` downloads end before more is computed: only then may their memory serve others."""
        while len(self._going_down) > remaining:
            finished, _ = self._going_down.popleft()
            torch.cuda.current_stream(self.device).wait_event(finished)


class Storage:
    """Makes maps: all on the device, skip connections on the host, or all on the host."""

    def __init__(self, place: Place, device: torch.device, dtype: torch.dtype):
        self.place, self.device, self.dtype = place, device, dtype
        self._copies = Copies(device)

    def further_out(self) -> Storage | None:
        """As this one with more of the maps on the host; None where all are there, or the host is the device."""
        outer = PLACES[PLACES.index(self.place) + 1 :]
        return Storage(outer[0], self.device, self.dtype) if outer and self.device.type != "cpu" else None

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
            self._copies.settle()  # the one before was copied while this one was computed
            copy = self._on_host(source.shape)
            copy.write(0, source.read(0, source.height))
            copy.moments = source.moments
            return copy
        source.kept = True
        return source

    def _on_device(self, shape: tuple[int, ...]) -> Map:
        if self.device.type == "cpu":
            return Map(mapped(shape, self.dtype))
        return Map(torch.empty(shape, dtype=self.dtype, device=self.device))

    def _on_host(self, shape: tuple[int, ...]) -> HostMap:
        if self.device.type == "cpu":
            return HostMap(mapped(shape, self.dtype), self._copies)
        return HostMap(torch.empty(shape, dtype=self.dtype, pin_memory=True), self._copies)


def mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in a memory mapping of its own, which goes back to the system when the tensor goes.

    In the C library's heap, maps would leave holes between the strips' small tensors, a third of the peak in all.
    Large pages, where the system has them, save the faults of writing to fresh memory. Raises MemoryError.
    """
    try:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    except OSError as error:
        raise MemoryError(f"no memory for a map of {shape}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel may be built without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
