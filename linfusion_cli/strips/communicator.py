"""Communication between devices that each hold a contiguous part of every map's rows, from top to bottom by rank."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class RowReader(Protocol):
    """Readable rows [B, H, W, C], for example those of a feature map."""

    @property
    def height(self) -> int:
        """Number of rows."""
        ...

    def read(self, top: int, bottom: int) -> Tensor:
        """Return rows [B, bottom - top, W, C] on the device."""
        ...


class Communicator(Protocol):
    """Collective operations between devices. Only implementations of this protocol know the number of devices."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all devices, which have the same shape."""
        ...

    def exchange_halo(self, part: RowReader, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the neighbours' `rows` rows [B, rows, W, C] above and below `part`; None at an edge of the image.

        Every device must hold at least `rows` rows; the code that distributes the rows ensures this. Call it before a
        pass over `part`: the pass can then overwrite rows it has read.
        """
        ...


class SingleDevice:
    """Communicator of a single device that holds the complete image."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return `tensor` unchanged."""
        return tensor

    def exchange_halo(self, part: RowReader, rows: int) -> tuple[None, None]:
        """Return None for both sides: there are no neighbours."""
        return None, None
