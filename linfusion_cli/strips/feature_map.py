"""Feature maps [B, H, W, C]: on the device, or in pinned host memory from where rows are uploaded ahead of need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linfusion_cli.strips.copies import Copies, Upload
from linfusion_cli.strips.stats import Moments


class MapShape:
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


class FeatureMap(MapShape):
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

    def flattened(self) -> FeatureMap:
        """The same memory as a map of one pixel a row, [B, H · W, 1, C]."""
        return FeatureMap(self.tensor.flatten(1, 2).unsqueeze(2))

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
class LastDownload:
    """The last download into a map; all views of its memory share it."""

    event: torch.cuda.Event | None = None


class HostFeatureMap(FeatureMap):
    """A map in host memory, pinned if the device is a CUDA card.

    Rows are read from top to bottom nearly always, so each read starts the upload of the rows that follow.
    """

    def __init__(self, tensor: Tensor, copies: Copies, written: LastDownload | None = None):
        super().__init__(tensor)
        self._copies, self._written = copies, written or LastDownload()
        self._ahead: Upload | None = None

    def flattened(self) -> FeatureMap:
        return HostFeatureMap(self.tensor.flatten(1, 2).unsqueeze(2), self._copies, self._written)

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
