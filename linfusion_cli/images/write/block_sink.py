"""What every sink does with its rows: check them, cut them into blocks, and clean up when something fails."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from linfusion_cli.core.atomic_file import AtomicFile
from linfusion_cli.images.metadata.metadata import ImageInfo
from linfusion_cli.images.write.pool import OrderedPool, default_threads

OPEN, DONE, ABORTED = "open", "closed", "aborted"


class RowStream(ABC):
    """A RowSink that stores rows in blocks of `block_rows` and encodes the blocks in threads.

    A format says how rows are stored in a block, how a full block is submitted to the pool, what is done with an
    encoded one, how the file ends, and where its checksum is put in (`verify` has the rule).
    """

    def __init__(self, pending: AtomicFile, size_px: tuple[int, int], bits: int, block_rows: int, threads: int | None):
        self.width_px, self.height_px = size_px
        self.bits = bits
        self.block_rows = min(block_rows, self.height_px)
        self._pending = pending
        self._pool = OrderedPool(threads or default_threads(), self._collect)
        self._sha256 = hashlib.sha256()
        self._row = 0
        self._filled = 0
        self._state = OPEN

    def write(self, rows: np.ndarray) -> None:
        with self._abort_on_error():
            self._require_open()
            check_rows(rows, (self.width_px, self.height_px), self.bits, self._row)
            while len(rows):
                room = self.block_rows - self._filled
                self._take(rows[:room])
                rows = rows[room:]

    def update_info(self, info: ImageInfo) -> None:
        if self._state == DONE:
            return
        with self._abort_on_error():
            self._require_open()
            if self._row:
                raise ValueError(f"{self._row} rows were written before")
            self._pending.clear()
            self._sha256 = hashlib.sha256()
            self._begin(info)

    def close(self) -> None:
        if self._state == DONE:
            return
        with self._abort_on_error():
            self._require_open()
            if self._row != self.height_px:
                raise ValueError(f"{self._row} rows of {self.height_px} were written")
            self._pool.finish()
            self._finish()
            self._seal(self._sha256.hexdigest())
            self._pending.commit()
            self._state = DONE

    def abort(self) -> None:
        if self._state == OPEN:
            self._state = ABORTED
            self._pool.cancel()
            self._pending.abort()

    @abstractmethod
    def _begin(self, info: ImageInfo) -> None:
        """Write what the empty file begins with, and prepare what it says of itself further down."""

    @abstractmethod
    def _store(self, rows: np.ndarray, at: int) -> None:
        """Copy `[rows, W, 3]` into the present block, from its row `at` on."""

    @abstractmethod
    def _submit(self, count: int) -> None:
        """Hand the present block, of `count` rows, to the pool, and begin another."""

    @abstractmethod
    def _collect(self, encoded: Any) -> None:
        """Append an encoded block to the file."""

    @abstractmethod
    def _finish(self) -> None:
        """Append what follows the last block."""

    @abstractmethod
    def _seal(self, digits: str) -> None:
        """Put the checksum in."""

    def _append(self, data: bytes) -> None:
        """Every byte of the file passes here, except for TIFF's header, which is written last."""
        self._sha256.update(data)
        self._pending.write(data)

    def _take(self, part: np.ndarray) -> None:
        self._store(part, self._filled)
        self._filled += len(part)
        self._row += len(part)
        if self._filled == self.block_rows or self._row == self.height_px:
            self._submit(self._filled)
            self._filled = 0

    def _require_open(self) -> None:
        if self._state != OPEN:
            raise ValueError(f"this sink is {self._state}")

    @contextmanager
    def _abort_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort()
            raise


def check_rows(rows: np.ndarray, size_px: tuple[int, int], bits: int, row: int) -> None:
    """Raises ValueError unless `rows` can be the rows of a picture from its row `row` on."""
    width_px, height_px = size_px
    if rows.ndim != 3 or rows.shape[1:] != (width_px, 3) or rows.dtype != np.dtype(f"uint{bits}"):
        raise ValueError(f"rows are {rows.dtype} {rows.shape}, not uint{bits} [rows, {width_px}, 3]")
    if row + len(rows) > height_px:
        raise ValueError(f"row {row + len(rows)} of a picture of {height_px} rows")
