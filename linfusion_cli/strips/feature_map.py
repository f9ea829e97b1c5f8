"""Feature maps [B, H, W, C], on the device or in pinned host memory with prefetched rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from linfusion_cli.strips.copies import Copies, Upload
from linfusion_cli.strips.stats import Moments


class MapShape:
    """The shape (B, H, W, C) of a map, and whether it must not be overwritten."""

    shape: tuple[int, int, int, int]
    is_read_only: bool

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.shape[1]

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.shape[2]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[3]


class FeatureMap(MapShape):
    """A map [B, H, W, C] on the device. Rows are read and written in place; a read returns a view.

    Code that writes the complete map also sets `moments`. Operations must not overwrite a map that `is_read_only`: a
    skip connection that is still needed, or a map that is recomputed on every read.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.shape = cast(tuple[int, int, int, int], tuple(tensor.shape))
        self.moments: Moments | None = None
        self.is_read_only = False

    def get_moments(self) -> Moments:
        """Return the moments of a completely written map."""
        assert self.moments is not None
        return self.moments

    def release(self) -> None:
        """Mark the map as writable, before the last read of a skip connection."""
        self.is_read_only = False

    def flatten(self) -> FeatureMap:
        """Return the same memory as a map with one pixel per row, [B, H · W, 1, C]."""
        return FeatureMap(self.tensor.flatten(1, 2).unsqueeze(2))

    def read(self, top: int, bottom: int) -> Tensor:
        """Return rows [B, bottom - top, W, C] on the device."""
        return self.tensor[:, top:bottom]

    def read_pixels(self, images: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Return single pixels [N, C] on the device, given their image, row and column indices."""
        places = torch.tensor([images, rows, columns]).to(self.tensor.device)
        return self.tensor[tuple(places)]

    def read_without_prefetch(self, top: int, bottom: int) -> Tensor:
        """Return rows as `read` does, without prefetching the rows that follow."""
        return self.read(top, bottom)

    def write(self, top: int, rows: Tensor) -> None:
        """Write rows [B, n, W, C] from row `top` on."""
        target = self.tensor[:, top : top + rows.shape[1]]
        if target.data_ptr() != rows.data_ptr():  # a view that was modified in place needs no copy
            target.copy_(rows)


@dataclass
class LastDownload:
    """The most recent download into a map, shared by all views of its memory."""

    event: torch.cuda.Event | None = None


class HostFeatureMap(FeatureMap):
    """A map in host memory, which is pinned if the device is a CUDA GPU.

    Rows are almost always read from top to bottom, so each read starts the upload of the rows that follow.
    """

    def __init__(self, tensor: Tensor, copies: Copies, last_download: LastDownload | None = None):
        super().__init__(tensor)
        self._copies, self._last_download = copies, last_download or LastDownload()
        self._prefetched: Upload | None = None

    def flatten(self) -> FeatureMap:
        """Return the same memory as a map with one pixel per row, sharing the state of downloads."""
        return HostFeatureMap(self.tensor.flatten(1, 2).unsqueeze(2), self._copies, self._last_download)

    def release(self) -> None:
        """Mark the map as writable, and release the device memory it was downloaded from."""
        super().release()
        self._copies.wait_downloads()

    def read(self, top: int, bottom: int) -> Tensor:
        """Return rows [B, bottom - top, W, C] on the device and prefetch as many rows below them."""
        upload = self._prefetched
        if upload is None or top != upload.top or bottom > upload.bottom:
            self._cancel_prefetch()
            upload = self._upload(top, bottom)
        following = min(2 * bottom - top, self.height)
        self._prefetched = self._upload(bottom, following) if bottom < following else None
        return self._copies.wait(upload)[:, : bottom - top]

    def read_without_prefetch(self, top: int, bottom: int) -> Tensor:
        """Return rows as `read` does, without prefetching the rows that follow."""
        self._cancel_prefetch()
        return self._copies.wait(self._upload(top, bottom))

    def read_pixels(self, images: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Copy only the selected pixels [N, C] to the device, after waiting for the last download."""
        if self._last_download.event is not None:
            self._last_download.event.synchronize()
        selected = self.tensor[torch.tensor(images), torch.tensor(rows), torch.tensor(columns)]
        return self._copies.to_device(selected, self.tensor.dtype)

    def write(self, top: int, rows: Tensor) -> None:
        """Start downloading `rows` into the map from row `top` on."""
        bottom = top + rows.shape[1]
        if self._prefetched and top < self._prefetched.bottom and bottom > self._prefetched.top:
            self._cancel_prefetch()  # the rows read ahead are stale
        self._last_download.event = self._copies.download(rows, self.tensor[:, top:bottom])

    def _upload(self, top: int, bottom: int) -> Upload:
        return self._copies.upload(top, bottom, self.tensor[:, top:bottom], self._last_download.event)

    def _cancel_prefetch(self) -> None:
        if self._prefetched:
            self._copies.wait(self._prefetched)  # the memory must not be reused while it is written to
        self._prefetched = None

    def __del__(self) -> None:
        self._cancel_prefetch()
