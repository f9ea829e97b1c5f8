"""Base classes of the sinks: check the rows, cut them into blocks, and remove the file after an error."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from linfusion_cli.core.atomic_file import AtomicFile
from linfusion_cli.images.metadata.metadata import ImageInfo
from linfusion_cli.images.write.pool import OrderedPool, count_default_threads

OPEN, CLOSED, ABORTED = "open", "closed", "aborted"


class BlockSink(ABC):
    """A RowSink that collects rows in blocks of `block_rows`; the last block can be shorter."""

    def __init__(self, size_px: tuple[int, int], bits: int, block_rows: int):
        self.width_px, self.height_px = size_px
        self.bits = bits
        self.block_rows = min(block_rows, self.height_px)
        self._row = 0
        self._block_fill = 0
        self._state = OPEN

    def write(self, rows: np.ndarray) -> None:
        """See RowSink."""
        with self._abort_on_error():
            self._check_rows(rows)
            while len(rows):
                room = self.block_rows - self._block_fill
                self._add_to_block(rows[:room])
                rows = rows[room:]

    def close(self) -> None:
        """See RowSink."""
        if self._state == CLOSED:
            return
        with self._abort_on_error():
            self._check_open()
            if self._row != self.height_px:
                raise ValueError(f"{self._row} rows of {self.height_px} were written")
            self._complete_file()
            self._state = CLOSED

    def abort(self) -> None:
        """See RowSink."""
        if self._state == OPEN:
            self._state = ABORTED
            self._discard_file()

    @abstractmethod
    def _copy_rows(self, rows: np.ndarray, start: int) -> None:
        """Copy rows [n, W, 3] into the current block, from row `start` of the block."""

    @abstractmethod
    def _finish_block(self, count: int) -> None:
        """Process the current block, which has `count` rows, and start a new one."""

    @abstractmethod
    def _complete_file(self) -> None:
        """Complete and publish the file after the last block."""

    @abstractmethod
    def _discard_file(self) -> None:
        """Remove the temporary file; never raise."""

    def _add_to_block(self, rows: np.ndarray) -> None:
        self._copy_rows(rows, self._block_fill)
        self._block_fill += len(rows)
        self._row += len(rows)
        if self._block_fill == self.block_rows or self._row == self.height_px:
            self._finish_block(self._block_fill)
            self._block_fill = 0

    def _check_rows(self, rows: np.ndarray) -> None:
        self._check_open()
        if rows.ndim != 3 or rows.shape[1:] != (self.width_px, 3) or rows.dtype != np.dtype(f"uint{self.bits}"):
            raise ValueError(f"rows are {rows.dtype} {rows.shape}, not uint{self.bits} [rows, {self.width_px}, 3]")
        if self._row + len(rows) > self.height_px:
            raise ValueError(f"row {self._row + len(rows)} of an image of {self.height_px} rows")

    def _check_open(self) -> None:
        if self._state != OPEN:
            raise ValueError(f"this sink is {self._state}")

    @contextmanager
    def _abort_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort()
            raise


@dataclass(frozen=True)
class SinkOptions:
    """The arguments of the sinks of all formats.

    `compression` is for TIFF, `jpeg_quality` for JPEG and TIFF; `threads` encode, by default `count_default_threads`.
    """

    file: AtomicFile
    size_px: tuple[int, int]
    bits: int
    info: ImageInfo
    compression: str
    jpeg_quality: int
    threads: int | None


class EncodedSink(BlockSink):
    """A sink that encodes its blocks in threads, writes them in order, and computes the checksum of the file.

    A subclass defines the layout of a block, its encoding, and the position of the checksum (see `verify.verify`).
    """

    def __init__(self, options: SinkOptions, block_rows: int):
        super().__init__(options.size_px, options.bits, block_rows)
        self._file = options.file
        self._pool = OrderedPool(options.threads or count_default_threads(), self._write_block)
        self._sha256 = hashlib.sha256()

    def update_info(self, info: ImageInfo) -> None:
        """See RowSink."""
        if self._state == CLOSED:
            return
        with self._abort_on_error():
            self._check_open()
            if self._row:
                raise ValueError(f"{self._row} rows were already written")
            self._file.clear()
            self._sha256 = hashlib.sha256()
            self._write_header(info)

    @abstractmethod
    def _write_header(self, info: ImageInfo) -> None:
        """Start the empty file with the metadata, or prepare the metadata that are written later."""

    @abstractmethod
    def _write_block(self, encoded: Any) -> None:
        """Append an encoded block to the file."""

    @abstractmethod
    def _write_trailer(self) -> None:
        """Append the data after the last block."""

    @abstractmethod
    def _write_checksum(self, digits: str) -> None:
        """Replace the zeros in the request by the digits of the checksum."""

    def _append(self, data: bytes) -> None:
        """Append to the file and to the checksum. Only TIFF's header is written in another way, at the end."""
        self._sha256.update(data)
        self._file.write(data)

    def _complete_file(self) -> None:
        self._pool.finish()
        self._write_trailer()
        self._write_checksum(self._sha256.hexdigest())
        self._file.commit()

    def _discard_file(self) -> None:
        self._pool.cancel()
        self._file.abort()
