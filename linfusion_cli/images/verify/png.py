"""PNG files decoded from end to end, and nothing kept (ISO/IEC 15948)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from linfusion_cli.images.metadata.metadata import NO_DIGITS
from linfusion_cli.images.write.deflate import INFLATE_ERRORS, crc32, inflater
from linfusion_cli.images.write.png import DIGITS_IN_CHUNK

PIECE_BYTES = 1 << 15  # inflates to a thousand times as much at the most
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
WHOLE = ((0, 1, 0, 1),)
# Section 8.2: the first column of each pass and their distance, the first row and their distance.
ADAM7 = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
FILTERS = bytes(range(5))


def decode_png(path: Path) -> None:
    """Raises ValueError for a chunk with another CRC, data that do not inflate, or rows that are not those of a picture
    of this size."""
    with path.open("rb") as file:
        file.seek(8)
        _, header = next(_pieces(file))
        file.seek(8)
        rows, codec = Rows(header), inflater()
        for kind, piece in _pieces(file):
            if kind == b"IDAT":
                try:
                    rows.take(codec.decompress(piece))
                except INFLATE_ERRORS as error:
                    raise ValueError(f"its data do not inflate after {rows} ({error})") from error
                if codec.unused_data:
                    raise ValueError(f"there are more data after {rows}")
    if rows.missing or not codec.eof:
        raise ValueError(f"its data end after {rows}")


def _pieces(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """The data of each chunk with its kind, in pieces; raises ValueError for a wrong CRC."""
    kind = b""
    while kind != b"IEND":
        head = file.read(8)
        missing, kind = int.from_bytes(head[:4]), head[4:]
        crc = zlib.crc32(kind)
        while missing:
            piece = file.read(min(missing, PIECE_BYTES))
            if not piece:
                raise EOFError("it became shorter while it was read")
            missing -= len(piece)
            crc = crc32(piece, crc)
            yield kind, piece
        if crc != int.from_bytes(file.read(4)):
            name, at = kind.decode("latin-1"), file.tell()
            raise ValueError(f"the checksum of its {name} chunk that ends at byte {at} is wrong")


def rest_of_chunk(file: BinaryIO, digits_at: int) -> bytes:
    """What follows the checksum's digits in their chunk, with the CRC that it had when there were zeros."""
    file.seek(digits_at - DIGITS_IN_CHUNK)
    length = int.from_bytes(file.read(4))
    chunk = file.read(4 + length)
    before, after = chunk[: DIGITS_IN_CHUNK - 4], chunk[DIGITS_IN_CHUNK - 4 + len(NO_DIGITS) :]
    return after + crc32(before + NO_DIGITS.encode() + after).to_bytes(4)


class Rows:
    """Counts the rows in the inflated data, of which it is given one piece after the other, and looks at the byte that
    each begins with: its filter. `missing` bytes are still to come."""

    def __init__(self, header: bytes):
        width_px, height_px, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
        if bits not in DEPTHS.get(colour, ()) or not width_px or not height_px:
            raise ValueError(f"{width_px}x{height_px} px of {bits} bits in colour type {colour} are no picture")
        self._passes = list(_passes(width_px, height_px, bits * CHANNELS[colour], ADAM7 if interlaced else WHOLE))
        self.missing = sum(rows * row_bytes for rows, row_bytes in self._passes)
        self._all = sum(rows for rows, _ in self._passes)
        self._begun = 0
        self._left, self._row_bytes, self._ahead = 0, 1, 0  # of this pass: bytes, bytes a row, bytes to the next filter

    def __str__(self) -> str:
        """How many rows are complete, of how many; the passes of an interlaced picture have rows of their own."""
        return f"{self._begun - (self._ahead > 0)} of {self._all} rows"

    def take(self, data: bytes) -> None:
        """Raises ValueError for a filter that does not exist, and for more data than the picture has."""
        if len(data) > self.missing:
            raise ValueError(f"there are more data than its {self._all} rows have")
        while data:
            if not self._left:
                rows, self._row_bytes = self._passes.pop(0)
                self._left, self._ahead = rows * self._row_bytes, 0
            part, data = data[: self._left], data[self._left :]
            self._count(part)

    def _count(self, part: bytes) -> None:
        filters = part[self._ahead :: self._row_bytes]
        sound = len(filters) - len(filters.lstrip(FILTERS))  # those before the first that does not exist
        self._begun += sound
        if sound < len(filters):
            self._ahead = 0
            raise ValueError(f"a filter that does not exist follows {self}")
        self._ahead = (self._ahead - len(part)) % self._row_bytes
        self._left -= len(part)
        self.missing -= len(part)


def _passes(
    width_px: int, height_px: int, pixel_bits: int, pattern: tuple[tuple[int, int, int, int], ...]
) -> Iterator[tuple[int, int]]:
    """Rows and bytes per row, the filter included, of each pass that has any pixels."""
    for left, across, top, down in pattern:
        columns, rows = -(-(width_px - left) // across), -(-(height_px - top) // down)
        if columns > 0 and rows > 0:
            yield rows, 1 + -(-columns * pixel_bits // 8)
