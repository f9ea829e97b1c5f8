"""Decode a PNG without storing pixels (ISO/IEC 15948)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from linfusion_cli.images.metadata.metadata import EMPTY_CHECKSUM
from linfusion_cli.images.write.deflate import INFLATE_ERRORS, Inflater, crc32
from linfusion_cli.images.write.png import CHECKSUM_OFFSET_IN_CHUNK

PIECE_BYTES = 1 << 15  # deflate expands it at most a thousandfold
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
# Per pass: the first column, the column step, the first row, the row step (section 8.2).
NOT_INTERLACED = ((0, 1, 0, 1),)
ADAM7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
FILTERS = bytes(range(5))


def decode_png(path: Path) -> None:
    """Decode all rows; raise ValueError for a wrong CRC, corrupt data, or missing, excess or invalid rows."""
    with path.open("rb") as file:
        file.seek(8)
        _, header = next(_iter_pieces(file))
        file.seek(8)
        counter, codec = RowCounter(header), Inflater()
        for kind, piece in _iter_pieces(file):
            if kind == b"IDAT":
                try:
                    counter.add(codec.decompress(piece))
                except INFLATE_ERRORS as error:
                    raise ValueError(f"its data do not inflate after {counter} ({error})") from error
                if codec.unused_data:
                    raise ValueError(f"it has excess data after {counter}")
    if counter.missing_bytes or not codec.eof:
        raise ValueError(f"its data end after {counter}")


def _iter_pieces(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield the type and the data of each chunk, in pieces; raise ValueError for a wrong CRC."""
    kind = b""
    while kind != b"IEND":
        head = file.read(8)
        missing, kind = int.from_bytes(head[:4]), head[4:]
        crc = zlib.crc32(kind)
        while missing:
            piece = file.read(min(missing, PIECE_BYTES))
            if not piece:
                raise EOFError("it was truncated during the verification")
            missing -= len(piece)
            crc = crc32(piece, crc)
            yield kind, piece
        if crc != int.from_bytes(file.read(4)):
            name, end = kind.decode("latin-1"), file.tell()
            raise ValueError(f"the CRC of its {name} chunk that ends at byte {end} is wrong")


def read_chunk_remainder(file: BinaryIO, digits_at: int) -> bytes:
    """Return the rest of the chunk after the checksum's digits, with the CRC of the chunk with zeros as digits."""
    file.seek(digits_at - CHECKSUM_OFFSET_IN_CHUNK)
    length = int.from_bytes(file.read(4))
    chunk = file.read(4 + length)
    before, after = chunk[: CHECKSUM_OFFSET_IN_CHUNK - 4], chunk[CHECKSUM_OFFSET_IN_CHUNK - 4 + len(EMPTY_CHECKSUM) :]
    return after + crc32(before + EMPTY_CHECKSUM.encode() + after).to_bytes(4)


class RowCounter:
    """Counts the rows in inflated data and checks their filter types.

    `missing_bytes` is the number of bytes until the end of the image.
    """

    def __init__(self, header: bytes):
        width_px, height_px, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
        if bits not in DEPTHS.get(colour, ()) or not width_px or not height_px:
            header_values = f"{width_px}x{height_px} px, {bits} bits, colour type {colour}"
            raise ValueError(f"its header is invalid ({header_values})")
        pattern = ADAM7 if interlaced else NOT_INTERLACED
        self._passes = list(_iter_passes(width_px, height_px, bits * CHANNELS[colour], pattern))
        self.missing_bytes = sum(rows * row_bytes for rows, row_bytes in self._passes)
        self._total_rows = sum(rows for rows, _ in self._passes)
        self._started_rows = 0
        # Of the current pass: remaining bytes, bytes per row, bytes until the next filter type.
        self._pass_bytes, self._row_bytes, self._to_next_filter = 0, 1, 0

    def __str__(self) -> str:
        """Return the number of complete rows and of all rows; the passes of an interlaced image count separately."""
        return f"{self._started_rows - (self._to_next_filter > 0)} of {self._total_rows} rows"

    def add(self, data: bytes) -> None:
        """Count the next piece of data; raise ValueError for an invalid filter type or excess data."""
        if len(data) > self.missing_bytes:
            raise ValueError(f"it has excess data after {self._total_rows} rows")
        while data:
            if not self._pass_bytes:
                rows, self._row_bytes = self._passes.pop(0)
                self._pass_bytes, self._to_next_filter = rows * self._row_bytes, 0
            part, data = data[: self._pass_bytes], data[self._pass_bytes :]
            self._count(part)

    def _count(self, part: bytes) -> None:
        filters = part[self._to_next_filter :: self._row_bytes]
        valid = len(filters) - len(filters.lstrip(FILTERS))  # the number before the first invalid one
        self._started_rows += valid
        if valid < len(filters):
            self._to_next_filter = 0
            raise ValueError(f"it has an invalid filter type after {self}")
        self._to_next_filter = (self._to_next_filter - len(part)) % self._row_bytes
        self._pass_bytes -= len(part)
        self.missing_bytes -= len(part)


def _iter_passes(
    width_px: int, height_px: int, pixel_bits: int, pattern: tuple[tuple[int, int, int, int], ...]
) -> Iterator[tuple[int, int]]:
    """Yield rows and bytes per row (with the filter type) of each pass that contains pixels."""
    for left, across, top, down in pattern:
        columns, rows = -(-(width_px - left) // across), -(-(height_px - top) // down)
        if columns > 0 and rows > 0:
            yield rows, 1 + -(-columns * pixel_bits // 8)
