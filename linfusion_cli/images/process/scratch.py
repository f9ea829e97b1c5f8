"""Temporary storage of an image between two phases: 16-bit rows in memory or in an anonymous file."""

from __future__ import annotations

import errno
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from linfusion_cli.core.errors import WriteFailed

FULL_SCALE = 65535
BYTES_PER_PX = 6  # three channels of 16 bits


class ScratchImage:
    """Pixels [H, W, 3] in [0, 1], stored with 16 bits in an anonymous file in `folder`, or in memory if that is None.

    The file is not memory-mapped: mapped pages would count as memory of this process.
    """

    def __init__(self, folder: Path | None, width: int, height: int):
        self.width, self.height = width, height
        self._folder, self._rows = folder, 0
        self._memory: np.ndarray | None = None
        self._file: io.FileIO | None = None
        if folder is None:
            self._memory = np.empty((height, width, 3), np.uint16)
        else:
            with self._disk_errors():
                # Unbuffered: after a failed write, closing a buffered file would fail again.
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by `close`

    def append(self, rows: np.ndarray) -> None:
        """Append float rows [n, W, 3] at the bottom; raise WriteFailed if the disk is full or fails."""
        quantised = np.rint(rows * FULL_SCALE).astype(np.uint16)
        if self._file is None:
            assert self._memory is not None
            self._memory[self._rows : self._rows + len(quantised)] = quantised
        else:
            self._write_file(self._file, quantised.data.cast("B"))
        self._rows += len(rows)

    def read(self, top: int, bottom: int, left: int = 0, right: int | None = None) -> np.ndarray:
        """Return the pixels of a region as float32 [bottom - top, right - left, 3]."""
        right = self.width if right is None else right
        if bottom > self._rows:
            raise ValueError(f"rows {top} to {bottom} were not all appended")
        if self._file is None:
            assert self._memory is not None
            quantised = self._memory[top:bottom, left:right]
        else:
            quantised = self._read_file(self._file, top, bottom, left, right)
        return quantised.astype(np.float32) / FULL_SCALE

    def _write_file(self, file: io.FileIO, data: memoryview) -> None:
        with self._disk_errors():
            file.seek(self._rows * self.width * BYTES_PER_PX)
            while data:
                data = data[file.write(data) :]

    def _read_file(self, file: io.FileIO, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Read a region of full width in one piece, and any other region row by row."""
        pixels = np.empty((bottom - top, right - left, 3), np.uint16)
        is_full_width = right - left == self.width
        pieces = [(top, pixels)] if is_full_width else enumerate(pixels, top)
        with self._disk_errors():
            for row, piece in pieces:
                file.seek((row * self.width + left) * BYTES_PER_PX)
                missing = piece.data.cast("B")
                while missing:
                    count = file.readinto(missing)
                    if not count:
                        raise OSError(errno.EIO, "the scratch file is too short")
                    missing = missing[count:]
        return pixels

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Convert OSError to WriteFailed."""
        try:
            yield
        except OSError as error:
            raise WriteFailed(
                f"The image between two phases could not be stored in {self._folder}: {error.strerror}.",
                "Free some space there, or use another folder with --output.",
            ) from error

    def close(self) -> None:
        """Free the memory or the file."""
        self._memory = None
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> ScratchImage:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
