"""Verification of an image file: all data decode, and the embedded checksum matches.

The checksum is SHA-256 over the whole file with 64 zeros in place of its digits; in a PNG, the CRC of the chunk with
the digits is also that for zeros. The first 16 bytes of a TIFF, which are written last, are hashed last. The checksum
therefore detects a change of any byte of the pixels and of the metadata.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import BinaryIO

from linfusion_cli.core.errors import DataError
from linfusion_cli.images.metadata.metadata import EMPTY_CHECKSUM
from linfusion_cli.images.read.file_info import FileInfo
from linfusion_cli.images.read.info import read_info, translate_read_errors
from linfusion_cli.images.write.ifd import HEADER_BYTES

PIECE_BYTES = 1 << 20


def verify_image(path: str | os.PathLike[str]) -> FileInfo:
    """Decode all tiles, strips or rows of a TIFF (first page), PNG or JPEG, a few at a time, and verify the checksum.

    `file_sha256` of the result is None if the file has no checksum, e.g. if it is from other software. In that case,
    damaged JPEG, LZW or uncompressed data can remain undetected: they can decode to other pixels without an error.
    Raise InputNotFound if the file does not exist or is not readable, and DataError if it is damaged.
    """
    info = read_info(path)
    with translate_read_errors(info.path):
        _decode(info)
        if info.file_sha256:
            _verify_checksum(info)
    return info


def _decode(info: FileInfo) -> None:
    if info.format == "tiff":
        from linfusion_cli.images.verify.tiff import decode_tiff

        decode_tiff(info.path)
    elif info.format == "png":
        from linfusion_cli.images.verify.png import decode_png

        decode_png(info.path)
    else:
        from linfusion_cli.images.read.source import decode_source

        decode_source(info.path)


def _verify_checksum(info: FileInfo) -> None:
    sha256 = hashlib.sha256()
    for piece in _iter_hashed_bytes(info):
        sha256.update(piece)
    digits = sha256.hexdigest()
    if digits != info.file_sha256:
        raise DataError(
            f"The checksum of {info.path} does not match: {digits} instead of {info.file_sha256}.",
            "The file is damaged, or another program has modified it.",
        )


def _iter_hashed_bytes(info: FileInfo) -> Iterator[bytes]:
    """Yield the pieces of the file in the order and with the substitutions of the checksum (see the module)."""
    digits_at, header_bytes = info.file_sha256_at, HEADER_BYTES if info.format == "tiff" else 0
    assert digits_at is not None
    with info.path.open("rb") as file:
        yield from _read_range(file, header_bytes, digits_at)
        yield EMPTY_CHECKSUM.encode()
        rest_at = digits_at + len(EMPTY_CHECKSUM)
        if info.format == "png":
            from linfusion_cli.images.verify.png import read_chunk_remainder

            rest = read_chunk_remainder(file, digits_at)
            yield rest
            rest_at += len(rest)
        yield from _read_range(file, rest_at, info.file_bytes)
        yield from _read_range(file, 0, header_bytes)


def _read_range(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    while start < end:
        piece = file.read(min(PIECE_BYTES, end - start))
        if not piece:
            raise EOFError("it was truncated during the verification")
        start += len(piece)
        yield piece
