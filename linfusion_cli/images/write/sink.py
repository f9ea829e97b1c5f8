"""The seam between whoever makes rows of a picture and whoever stores them."""

from typing import Protocol

import numpy as np

from linfusion_cli.images.metadata.metadata import ImageInfo


class RowSink(Protocol):
    """Takes a picture from top to bottom and holds a bounded number of its rows.

    A sink that raised, in `write` or in `close`, has already aborted itself: nothing is left on disk.
    """

    def write(self, rows: np.ndarray) -> None:
        """Take the next `[rows, W, 3]` rows, uint8 or uint16 as declared, any number of them. They are copied.

        Raises ValueError for another shape or dtype or for more rows than declared, WriteFailed when the disk refuses.
        """

    def update_info(self, info: ImageInfo) -> None:
        """Let the file say this of itself instead, which is possible before its first rows; not if it is complete.

        Raises ValueError after the first rows, WriteFailed when the disk refuses.
        """

    def close(self) -> None:
        """All rows were written: complete the file, sync file and folder, give it its final name.

        Raises ValueError when rows are missing, WriteFailed when the disk refuses, CannotCreate when the target has
        appeared meanwhile. Closing twice does nothing.
        """

    def abort(self) -> None:
        """Remove the temporary file. Harmless after `close`, and never raises."""
