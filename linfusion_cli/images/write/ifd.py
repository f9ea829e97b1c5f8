"""The image file directory (IFD) of a TIFF: TIFF 6.0 section 2, and BigTIFF."""

import struct
from collections.abc import Sequence
from fractions import Fraction

HEADER_BYTES = 16  # space for the BigTIFF header: the format is decided after the last tile
CLASSIC_LIMIT = 2**32
ASCII, SHORT, LONG, RATIONAL, UNDEFINED, BYTE, LONG8 = 2, 3, 4, 5, 7, 1, 16
FORMATS = {SHORT: "H", LONG: "I", LONG8: "Q"}

Entry = tuple[int, int, bytes]  # type, count, value


def encode_ascii(text: str) -> Entry:
    """Encode a text in 7-bit ASCII with a final NUL; other characters become question marks."""
    value = text.encode("ascii", errors="replace") + b"\0"
    return ASCII, len(value), value


def encode_bytes(value: bytes, kind: int) -> Entry:
    """Encode bytes as type BYTE or UNDEFINED."""
    return kind, len(value), value


def encode_shorts(*values: int) -> Entry:
    """Encode integers with 16 bits each."""
    return SHORT, len(values), struct.pack(f"<{len(values)}H", *values)


def encode_longs(values: Sequence[int]) -> Entry:
    """Encode integers with 32 bits each, or 64 if one of them does not fit."""
    kind = LONG if max(values) < CLASSIC_LIMIT else LONG8
    return kind, len(values), struct.pack(f"<{len(values)}{FORMATS[kind]}", *values)


def encode_rational(value: float) -> Entry:
    """Encode a number as a fraction of two 32-bit integers."""
    fraction = Fraction(value).limit_denominator(10_000)
    return RATIONAL, 1, struct.pack("<II", fraction.numerator, fraction.denominator)


def build_directory(tags: dict[int, Entry], offset: int) -> tuple[bytes, bytes, dict[int, int]]:
    """Return the file header, the directory for byte `offset` (a multiple of 8), and the offsets of long values by tag.

    Long values are those that do not fit into the directory entry. The byte order is little-endian. The format is
    BigTIFF only if classic 32-bit offsets cannot reach the end of the file.
    """
    size = sum(len(value) + 24 for _, _, value in tags.values()) + 64
    is_big = offset + size >= CLASSIC_LIMIT
    header = struct.pack("<2sHHHQ", b"II", 43, 8, 0, offset) if is_big else struct.pack("<2sHI", b"II", 42, offset)
    return header, *_encode_entries(tags, offset, is_big)


def _encode_entries(tags: dict[int, Entry], offset: int, is_big: bool) -> tuple[bytes, dict[int, int]]:
    word, count, field = ("<Q", "<Q", 8) if is_big else ("<I", "<H", 4)
    table = [struct.pack(count, len(tags))]
    values, offsets = b"", {}
    values_at = offset + struct.calcsize(count) + len(tags) * (4 + 2 * field) + field
    values_at += values_at % 2
    for tag, (kind, number, value) in sorted(tags.items()):
        if len(value) > field:
            offsets[tag] = values_at + len(values)
            content = struct.pack(word, offsets[tag])
            values += value + b"\0" * (len(value) % 2)  # values are aligned to 16 bits
        else:
            content = value.ljust(field, b"\0")
        table.append(struct.pack("<HH", tag, kind) + struct.pack(word, number) + content)
    next_directory = struct.pack(word, 0)
    return (b"".join([*table, next_directory])).ljust(values_at - offset, b"\0") + values, offsets
