"""Copies between pinned host memory and a CUDA device, on one stream for each direction, beside computing."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from linfusion_cli.strips.pinned import PinnedMemory

DOWNLOADS = 2  # strips on their way to the host at a time: one being copied while the next is computed
STAGED = 2  # tensors of the CPU on their way through pinned memory: one is read or computed while another is copied


@dataclass(frozen=True)
class Upload:
    """Rows [top, bottom) of a map under way to the device: where they will be, and the event of their arrival."""

    top: int
    bottom: int
    rows: Tensor
    event: torch.cuda.Event | None


class Copies:
    """Uploads and downloads of rows [B, n, W, C]; both wait for what the computing stream was given before.

    The computing stream waits for every upload, and an upload for the download that wrote its rows last. So memory on
    the host that was freed may serve a new map at once: what is written to it first waits for the computing stream.
    On the CPU all copies are done when a call returns.
    """

    def __init__(self, device: torch.device, pinned: PinnedMemory | None = None):
        self.device, self.pinned = device, pinned or PinnedMemory(device)
        self._uploads, self._downloads = streams(device)
        self._going_down: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._staged: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    @property
    def are_under_way(self) -> bool:
        """Whether copies go on beside other work, and have to be waited for."""
        return self._uploads is not None

    def up(self, top: int, bottom: int, rows: Tensor, written: torch.cuda.Event | None) -> Upload:
        """Start to copy `rows` of the host, which `written` has written, to the device."""
        if self._uploads is None:
            return Upload(top, bottom, rows.clone(), None)
        target = torch.empty(rows.shape, dtype=rows.dtype, device=self.device)
        self._uploads.wait_stream(torch.cuda.current_stream(self.device))  # its memory may still be in use
        if written is not None:
            self._uploads.wait_event(written)
        with torch.cuda.stream(self._uploads):
            copy_rows(target, rows)
        return Upload(top, bottom, target, self._uploads.record_event())

    def to_device(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the CPU's memory on the device, in `dtype`, through pinned memory."""
        if self._uploads is None:
            return tensor.to(dtype)
        staged = self.pinned.empty(tuple(tensor.shape), dtype)
        staged.copy_(tensor)
        upload = self.up(0, 0, staged[None], None)
        self._staged.append((upload.event, staged))
        if len(self._staged) > STAGED:
            self._staged.popleft()[0].synchronize()  # only then may the CPU write to its memory again
        return self.arrived(upload)[0]

    def arrived(self, upload: Upload) -> Tensor:
        """The rows of `upload`: whatever is computed from now on finds them there."""
        if upload.event is not None:
            torch.cuda.current_stream(self.device).wait_event(upload.event)
        return upload.rows

    def down(self, rows: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """Start to copy `rows` of the device to `target` on the host -> the event of their arrival.

        Few strips are under way at a time.
        """
        if self._downloads is None:
            target.copy_(rows)
            return None
        self._downloads.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._downloads):
            copy_rows(target, rows)
        event = self._downloads.record_event()
        self._going_down.append((event, rows))
        self.settle(DOWNLOADS)
        return event

    def settle(self, remaining: int = 0) -> None:
        """Let all but `remaining` downloads end before more is computed: only then may their memory serve others."""
        while len(self._going_down) > remaining:
            finished, _ = self._going_down.popleft()
            torch.cuda.current_stream(self.device).wait_event(finished)


@dataclass(frozen=True)
class Download:
    """Rows under way to the CPU, and whether all of them are finite."""

    rows: Tensor
    finite: Tensor
    event: torch.cuda.Event | None = None

    @staticmethod
    def of(rows: Tensor, finite: Tensor, copies: Copies, capacity: int) -> Download:
        """Start to copy rows [n, W, C] and the bool `finite` [] of the device, through memory for `capacity` rows."""
        if not copies.are_under_way:
            return Download(rows, finite)
        size = max(capacity, len(rows)) * rows[0].nbytes  # of one size, or they would not fit where others were
        memory = copies.pinned.empty((size + 1,), torch.uint8)
        targets = memory[: rows.nbytes].view(rows.dtype).view(rows.shape), memory[size:].view(torch.bool)
        copies.down(finite[None], targets[1])
        return Download(*targets, copies.down(rows[None], targets[0][None]))

    def wait(self) -> Tensor | None:
        """The rows, in memory that is theirs; None where some number is NaN or Inf."""
        if self.event is None:
            return self.rows if self.finite else None
        self.event.synchronize()
        return self.rows.clone() if self.finite else None


def streams(device: torch.device) -> tuple[torch.cuda.Stream | None, torch.cuda.Stream | None]:
    """One for uploads and one for downloads, as a bus carries both at a time; none on the CPU."""
    return (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else (None, None)


def copy_rows(target: Tensor, rows: Tensor) -> None:
    """Image by image: rows of several lie apart, and torch would copy those through pageable memory, and wait."""
    for one, other in zip(target, rows, strict=True):
        one.copy_(other, non_blocking=True)
