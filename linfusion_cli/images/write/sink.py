"""The interface between the code that computes rows and the writers of image files."""

from typing import Protocol

import numpy as np

from linfusion_cli.images.metadata.metadata import ImageInfo


class RowSink(Protocol):
    """A writer that takes an image from top to bottom and holds a bounded number of rows.

    After an exception in `write`, `update_info` or `close`, the sink is aborted and has removed its file.
    """

    def write(self, rows: np.ndarray) -> None:
        """Append any number of rows [n, W, 3] of the declared type, uint8 or uint16. The rows are copied.

        Raise ValueError for another shape or dtype or for too many rows, WriteFailed if the disk is full or fails.
        """

    def update_info(self, info: ImageInfo) -> None:
        """Replace the metadata of the file. Does nothing after `close`.

        Raise ValueError if rows were already written, WriteFailed if the disk is full or fails.
        """

    def close(self) -> None:
        """Complete the file: sync it, rename it to its target, and sync the folder. A second call does nothing.

        Raise ValueError if rows are missing, WriteFailed if the disk is full or fails, CannotCreateOutput if another
        process has created the target.
        """

    def abort(self) -> None:
        """Remove the temporary file. Does nothing after `close`, and never raises."""
