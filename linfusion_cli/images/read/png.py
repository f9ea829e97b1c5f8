"""PNG files, chunk by chunk (ISO/IEC 15948)."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from linfusion_cli.images.read.file_info import FileInfo, parse_checksum, parse_request, truncated
from linfusion_cli.images.write.png import DIGITS_IN_CHUNK, REQUEST

MAX_TEXT_BYTES = 1 << 26  # of one chunk, also after decompression
TEXT_KINDS = (b"tEXt", b"zTXt", b"iTXt")


def read_png(path: Path) -> FileInfo:
    """Raises DataError when the file ends before its IEND chunk, ValueError and the like when it is malformed."""
    small: dict[bytes, bytes] = {}
    texts: dict[str, str] = {}
    places: dict[str, int] = {}
    with path.open("rb") as file:
        for kind, data, at in _chunks(path, file):
            if kind in TEXT_KINDS:
                keyword, text = _text(kind, data)
                texts[keyword], places[keyword] = text, at
            else:
                small[kind] = data
    if b"IDAT" not in small or b"IHDR" not in small:
        raise ValueError("there is no picture in it")
    width_px, height_px, bits = struct.unpack(">IIB", small[b"IHDR"][:9])
    checksum = parse_checksum(texts.get(REQUEST))
    return FileInfo(
        path=path,
        format="png",
        width_px=width_px,
        height_px=height_px,
        bits=bits,
        tile_px=None,
        compression="deflate",
        dpi=_dpi(small.get(b"pHYs")),
        file_bytes=path.stat().st_size,
        request=parse_request(texts.get(REQUEST)),
        parameters=texts.get("parameters"),
        file_sha256=checksum,
        file_sha256_at=places[REQUEST] + DIGITS_IN_CHUNK if checksum else None,
    )


def _chunks(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, bytes, int]]:
    """Kind, data and first byte of each chunk; data are checked against their CRC, those of IDAT not even read."""
    file_bytes, at, kind = path.stat().st_size, 8, b""
    while kind != b"IEND":
        file.seek(at)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4]), head[4:]
        at += 12 + length
        if len(head) < 8 or at > file_bytes:
            raise truncated(path, "it has no end mark (IEND)")
        known = kind != b"IDAT" and length <= MAX_TEXT_BYTES
        data = file.read(length) if known else b""
        if known and zlib.crc32(kind + data) != int.from_bytes(file.read(4)):
            raise ValueError(f"the checksum of its {kind.decode('latin-1')} chunk is wrong")
        yield kind, data, at - 12 - length


def _text(kind: bytes, data: bytes) -> tuple[str, str]:
    keyword, _, rest = data.partition(b"\0")
    name = keyword.decode("latin-1")
    if kind == b"tEXt":
        return name, rest.decode("latin-1")
    if kind == b"zTXt":
        return name, _inflated(rest[1:]).decode("latin-1")
    compressed, (_, _, text) = rest[0], rest[2:].split(b"\0", 2)
    return name, (_inflated(text) if compressed else text).decode(errors="replace")


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, MAX_TEXT_BYTES)
    except zlib.error as error:
        raise ValueError(f"a text in it does not decompress ({error})") from error


def _dpi(physical: bytes | None) -> float | None:
    if physical is None:
        return None
    per_metre, _, unit = struct.unpack(">IIB", physical)
    return round(per_metre * 0.0254, 2) if unit == 1 else None
