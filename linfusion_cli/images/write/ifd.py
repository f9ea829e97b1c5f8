"""The directory of a TIFF file (TIFF 6.0 section 2, and BigTIFF)."""

import struct
from collections.abc import Sequence
from fractions import Fraction

HEADER_BYTES = 16  # room for the larger header: which one it is shows only when all tiles are written
CLASSIC_LIMIT = 2**32
ASCII, SHORT, LONG, RATIONAL, UNDEFINED, BYTE, LONG8 = 2, 3, 4, 5, 7, 1, 16
FORMATS = {SHORT: "H", LONG: "I", LONG8: "Q"}

Entry = tuple[int, int, bytes]  # type, count, value


def ascii_text(text: str) -> Entry:
    value = text.encode("ascii", errors="replace") + b"\0"
    return ASCII, len(value), value


def blob(value: bytes, kind: int) -> Entry:
    return kind, len(value), value


def shorts(*values: int) -> Entry:
    return SHORT, len(values), struct.pack(f"<{len(values)}H", *values)


def longs(values: Sequence[int]) -> Entry:
    """32 bits each, or 64 where one does not fit."""
    kind = LONG if max(values) < CLASSIC_LIMIT else LONG8
    return kind, len(values), struct.pack(f"<{len(values)}{FORMATS[kind]}", *values)


def rational(value: float) -> Entry:
    fraction = Fraction(value).limit_denominator(10_000)
    return RATIONAL, 1, struct.pack("<II", fraction.numerator, fraction.denominator)


def directory(tags: dict[int, Entry], offset: int) -> tuple[bytes, bytes, dict[int, int]]:
    """The file's header, the directory to append at byte `offset` (a multiple of 8), and where in the file the values
    lie that are longer than a field, by tag: little-endian, and BigTIFF only when classic offsets could not reach its
    end."""
    size = sum(len(value) + 24 for _, _, value in tags.values()) + 64
    big = offset + size >= CLASSIC_LIMIT
    header = struct.pack("<2sHHHQ", b"II", 43, 8, 0, offset) if big else struct.pack("<2sHI", b"II", 42, offset)
    return header, *_entries(tags, offset, big)


def _entries(tags: dict[int, Entry], offset: int, big: bool) -> tuple[bytes, dict[int, int]]:
    word, count, field = ("<Q", "<Q", 8) if big else ("<I", "<H", 4)
    table = [struct.pack(count, len(tags))]
    values, places = b"", {}
    values_at = offset + struct.calcsize(count) + len(tags) * (4 + 2 * field) + field
    values_at += values_at % 2
    for tag, (kind, number, value) in sorted(tags.items()):
        if len(value) > field:
            places[tag] = values_at + len(values)
            where = struct.pack(word, places[tag])
            values += value + b"\0" * (len(value) % 2)  # values begin on word borders
        else:
            where = value.ljust(field, b"\0")
        table.append(struct.pack("<HH", tag, kind) + struct.pack(word, number) + where)
    last = struct.pack(word, 0)  # no next directory
    return (b"".join([*table, last])).ljust(values_at - offset, b"\0") + values, places
