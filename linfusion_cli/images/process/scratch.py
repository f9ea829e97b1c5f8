"""A picture waiting between two phases: 16-bit rows in memory, or in a file without a name, which leaves nothing."""

from __future__ import annotations

import errno
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
    """Pixels [H, W, 3] between 0 and 1, kept to 16 bits in an anonymous file in `folder`; `folder` None is memory.

    The file is read and written, never mapped: mapped pages would count as this program's memory.
    """

    def __init__(self, folder: Path | None, width: int, height: int):
        self.width, self.height = width, height
        self._folder, self._rows, self._memory, self._file = folder, 0, None, None
        if folder is None:
            self._memory = np.empty((height, width, 3), np.uint16)
        else:
            with self._disk_errors():
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # a buffer would fail again on closing

    def append(self, rows: np.ndarray) -> None:
        """Float rows [n, W, 3], below those already there; raises WriteFailed when the disk refuses."""
        kept = np.rint(rows * FULL_SCALE).astype(np.uint16)
        if self._memory is not None:
            self._memory[self._rows : self._rows + len(kept)] = kept
        else:
            self._write(memoryview(kept).cast("B"))
        self._rows += len(rows)

    def read(self, top: int, bottom: int, left: int = 0, right: int | None = None) -> np.ndarray:
        """The pixels of this region as float32 [bottom - top, right - left, 3]."""
        right = self.width if right is None else right
        if bottom > self._rows:
            raise ValueError(f"rows {top} to {bottom} were not all appended")
        found = self._fetch(top, bottom, left, right) if self._memory is None else self._memory[top:bottom, left:right]
        return found.astype(np.float32) / FULL_SCALE

    def _write(self, left: memoryview) -> None:
        with self._disk_errors():
            self._file.seek(self._rows * self.width * BYTES_PER_PX)
            while left:
                left = left[self._file.write(left) :]

    def _fetch(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """The region from the file: in one piece if its rows are whole, else row by row."""
        data = np.empty((bottom - top, right - left, 3), np.uint16)
        whole = right - left == self.width
        pieces = [(top, data)] if whole else enumerate(data, top)
        with self._disk_errors():
            for row, piece in pieces:
                self._file.seek((row * self.width + left) * BYTES_PER_PX)
                missing = memoryview(piece).cast("B")
                while missing:
                    count = self._file.readinto(missing)
                    if not count:  # or this would go on for ever
                        raise OSError(errno.EIO, "the file is shorter than what was written")
                    missing = missing[count:]
        return data

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteFailed(
                f"The picture between two phases could not be kept in {self._folder} ({error.strerror}).",
                "Free some space there, or choose another folder with -o.",
            ) from error

    def close(self) -> None:
        self._memory = None
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> ScratchImage:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
