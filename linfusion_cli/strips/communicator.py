"""The seam between one device and many: each holds the rows of its part of every map, from top to bottom by rank."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Rows(Protocol):
    """Rows [B, H, W, C] that can be read, such as those of a feature map."""

    @property
    def height(self) -> int:
        """The number of rows."""

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows [B, bottom - top, W, C] on the device."""


class Communicator(Protocol):
    """What a device asks of the others; no other code asks how many there are."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all devices' tensors, of one shape."""

    def halo(self, part: Rows, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """The neighbours' `rows` rows [B, rows, W, C] above and below `part`; None at the edge of the picture.

        Every device must have as many: whoever divides the rows sees to that. Asked before a pass over `part` begins,
        so that a pass may write over what it has read.
        """


class SingleDevice:
    """One device, which has the whole picture."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def halo(self, part: Rows, rows: int) -> tuple[None, None]:
        return None, None
