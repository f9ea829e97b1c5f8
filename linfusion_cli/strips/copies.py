"""Asynchronous copies between pinned host memory and a CUDA device, with one stream per direction."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from linfusion_cli.strips.pinned import PinnedMemory

MAX_DOWNLOADS = 2  # pending downloads of strips: one is copied while the next one is computed
MAX_STAGED = 2  # CPU tensors staged in pinned memory: one is read or computed while another is copied


@dataclass(frozen=True)
class Upload:
    """A pending upload of rows [top, bottom) of a map: the target tensor on the device, and the completion event."""

    top: int
    bottom: int
    rows: Tensor
    event: torch.cuda.Event | None


class Copies:
    """Uploads and downloads of rows [B, n, W, C], ordered after the work already queued on the compute stream.

    The compute stream waits for every upload, and an upload waits for the download that last wrote its rows. Freed
    host memory can therefore be reused at once: writing to it first waits for the compute stream. On the CPU, all
    copies complete before a call returns.
    """

    def __init__(self, device: torch.device, pinned: PinnedMemory | None = None):
        self.device, self.pinned = device, pinned or PinnedMemory(device)
        self._uploads, self._downloads = create_streams(device)
        self._pending_downloads: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._staged: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    @property
    def is_asynchronous(self) -> bool:
        """Whether copies run concurrently with other work and have to be waited for."""
        return self._uploads is not None

    def upload(self, top: int, bottom: int, rows: Tensor, written: torch.cuda.Event | None) -> Upload:
        """Start copying host `rows` to the device, after the event `written` that marks the end of their last write."""
        if self._uploads is None:
            return Upload(top, bottom, rows.clone(), None)
        target = torch.empty(rows.shape, dtype=rows.dtype, device=self.device)
        self._uploads.wait_stream(torch.cuda.current_stream(self.device))  # the target's memory may still be in use
        if written is not None:
            self._uploads.wait_event(written)
        with torch.cuda.stream(self._uploads):
            copy_rows(target, rows)
        return Upload(top, bottom, target, cast(torch.cuda.Event, self._uploads.record_event()))

    def to_device(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy a CPU tensor to the device in `dtype`, staged through pinned memory."""
        if self._uploads is None:
            return tensor.to(dtype)
        staged = self.pinned.empty(tuple(tensor.shape), dtype)
        staged.copy_(tensor)
        upload = self.upload(0, 0, staged[None], None)
        assert upload.event is not None  # uploads are asynchronous
        self._staged.append((upload.event, staged))
        if len(self._staged) > MAX_STAGED:
            self._staged.popleft()[0].synchronize()  # before the CPU writes to this memory again
        return self.wait(upload)[0]

    def wait(self, upload: Upload) -> Tensor:
        """Make the compute stream wait for `upload` and return its rows."""
        if upload.event is not None:
            torch.cuda.current_stream(self.device).wait_event(upload.event)
        return upload.rows

    def download(self, rows: Tensor, target: Tensor) -> torch.cuda.Event | None:
        """Start copying device `rows` to `target` on the host. Return the event of completion, None on the CPU.

        At most MAX_DOWNLOADS strips are pending at a time.
        """
        if self._downloads is None:
            target.copy_(rows)
            return None
        self._downloads.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._downloads):
            copy_rows(target, rows)
        event = cast(torch.cuda.Event, self._downloads.record_event())
        self._pending_downloads.append((event, rows))
        self.wait_downloads(MAX_DOWNLOADS)
        return event

    def wait_downloads(self, remaining: int = 0) -> None:
        """Make the compute stream wait for all but `remaining` downloads. Their source memory can then be reused."""
        while len(self._pending_downloads) > remaining:
            event, _ = self._pending_downloads.popleft()
            torch.cuda.current_stream(self.device).wait_event(event)


@dataclass(frozen=True)
class Download:
    """A pending download of rows to the CPU, and whether all their values are finite."""

    rows: Tensor
    finite: Tensor
    event: torch.cuda.Event | None = None

    @staticmethod
    def start(rows: Tensor, finite: Tensor, copies: Copies, capacity: int) -> Download:
        """Start copying rows [n, W, C] and the bool `finite` [] from the device, using a buffer for `capacity` rows."""
        if not copies.is_asynchronous:
            return Download(rows, finite)
        size = max(capacity, len(rows)) * rows[0].nbytes  # a constant size allows reuse of freed blocks
        memory = copies.pinned.empty((size + 1,), torch.uint8)
        targets = memory[: rows.nbytes].view(rows.dtype).view(rows.shape), memory[size:].view(torch.bool)
        copies.download(finite[None], targets[1])
        return Download(*targets, copies.download(rows[None], targets[0][None]))

    def wait(self) -> Tensor | None:
        """Wait, and return the rows in memory they own. Return None if they contain NaN or Inf."""
        if self.event is None:
            return self.rows if self.finite else None
        self.event.synchronize()
        return self.rows.clone() if self.finite else None


def create_streams(device: torch.device) -> tuple[torch.cuda.Stream | None, torch.cuda.Stream | None]:
    """Return a stream for uploads and one for downloads, since the bus is full duplex; None for both on the CPU."""
    return (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else (None, None)


def copy_rows(target: Tensor, rows: Tensor) -> None:
    """Copy image by image.

    The rows of a batch are not contiguous. Torch would copy them through pageable memory, and block.
    """
    for target_image, image in zip(target, rows, strict=True):
        target_image.copy_(image, non_blocking=True)
