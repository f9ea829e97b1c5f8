"""Reading the chunks of PNG files (ISO/IEC 15948)."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from linfusion_cli.images.read.file_info import FileInfo, build_truncation_error, parse_checksum, parse_request
from linfusion_cli.images.write.png import CHECKSUM_OFFSET_IN_CHUNK, REQUEST_KEYWORD

MAX_TEXT_BYTES = 1 << 26  # per chunk, before and after decompression
TEXT_KINDS = (b"tEXt", b"zTXt", b"iTXt")


def read_png(path: Path) -> FileInfo:
    """Read a PNG; raise DataError if it ends before its IEND chunk, an exception of MALFORMED if it is malformed."""
    chunks: dict[bytes, bytes] = {}
    texts: dict[str, str] = {}
    offsets: dict[str, int] = {}
    with path.open("rb") as file:
        for kind, data, offset in _iter_chunks(path, file):
            if kind in TEXT_KINDS:
                keyword, text = _parse_text(kind, data)
                texts[keyword], offsets[keyword] = text, offset
            else:
                chunks[kind] = data
    if b"IDAT" not in chunks or b"IHDR" not in chunks:
        raise ValueError("it contains no image data")
    width_px, height_px, bits = struct.unpack(">IIB", chunks[b"IHDR"][:9])
    checksum = parse_checksum(texts.get(REQUEST_KEYWORD))
    return FileInfo(
        path=path,
        format="png",
        width_px=width_px,
        height_px=height_px,
        bits=bits,
        tile_px=None,
        compression="deflate",
        dpi=_parse_dpi(chunks.get(b"pHYs")),
        file_bytes=path.stat().st_size,
        request=parse_request(texts.get(REQUEST_KEYWORD)),
        parameters=texts.get("parameters"),
        file_sha256=checksum,
        file_sha256_at=offsets[REQUEST_KEYWORD] + CHECKSUM_OFFSET_IN_CHUNK if checksum else None,
    )


def _iter_chunks(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, bytes, int]]:
    """Yield type, data and file offset of each chunk; check the CRC. IDAT and very large chunks are not read."""
    file_bytes, at, kind = path.stat().st_size, 8, b""
    while kind != b"IEND":
        file.seek(at)
        head = file.read(8)
        length, kind = int.from_bytes(head[:4]), head[4:]
        at += 12 + length
        if len(head) < 8 or at > file_bytes:
            raise build_truncation_error(path, "it has no end marker (IEND)")
        is_read = kind != b"IDAT" and length <= MAX_TEXT_BYTES
        data = file.read(length) if is_read else b""
        if is_read and zlib.crc32(kind + data) != int.from_bytes(file.read(4)):
            raise ValueError(f"the CRC of its {kind.decode('latin-1')} chunk is wrong")
        yield kind, data, at - 12 - length


def _parse_text(kind: bytes, data: bytes) -> tuple[str, str]:
    """Return keyword and text of a tEXt, zTXt or iTXt chunk."""
    keyword, _, rest = data.partition(b"\0")
    name = keyword.decode("latin-1")
    if kind == b"tEXt":
        return name, rest.decode("latin-1")
    if kind == b"zTXt":
        return name, _inflate(rest[1:]).decode("latin-1")
    compressed, (_, _, text) = rest[0], rest[2:].split(b"\0", 2)
    return name, (_inflate(text) if compressed else text).decode(errors="replace")


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, MAX_TEXT_BYTES)
    except zlib.error as error:
        raise ValueError(f"a compressed text chunk is corrupt ({error})") from error


def _parse_dpi(physical: bytes | None) -> float | None:
    if physical is None:
        return None
    per_metre, _, unit = struct.unpack(">IIB", physical)
    return round(per_metre * 0.0254, 2) if unit == 1 else None
