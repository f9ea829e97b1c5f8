"""A picture waiting between two phases: 16-bit rows in a file without a name, so that nothing is left behind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from linfusion_cli.errors import WriteFailed

FULL_SCALE = 65535


class ScratchPicture:
    """Rows [H, W, 3] between 0 and 1, kept to 16 bits in an anonymous file in `folder`.

    Read and written, never mapped: mapped pages would count as this program's memory.
    """

    def __init__(self, folder: Path, width: int, height: int):
        self.width, self.height = width, height
        self._row_bytes = width * 3 * 2
        self._folder = folder
        self._rows = 0
        with self._disk_errors():
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # a buffer would fail again on closing

    def append(self, rows: np.ndarray) -> None:
        """Float rows [n, W, 3], below those already there; raises WriteFailed when the disk refuses."""
        left = memoryview(np.rint(rows * FULL_SCALE).astype(np.uint16)).cast("B")
        with self._disk_errors():
            self._file.seek(self._rows * self._row_bytes)
            while left:
                left = left[self._file.write(left) :]
        self._rows += len(rows)

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Rows top..bottom as float32 [bottom - top, W, 3]."""
        data = np.empty((bottom - top, self.width, 3), np.uint16)
        left = memoryview(data).cast("B")
        with self._disk_errors():
            self._file.seek(top * self._row_bytes)
            while left:
                count = self._file.readinto(left)
                if not count:
                    raise ValueError(f"rows {top} to {bottom} were not all appended")
                left = left[count:]
        return data.astype(np.float32) / FULL_SCALE

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
        self._file.close()

    def __enter__(self) -> ScratchPicture:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
