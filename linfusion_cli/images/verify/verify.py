"""Whether a picture file is what was written: everything in it decodes, and its checksum is right.

The rule of the checksum: SHA-256 of the whole file as it was before its digits were put in, when 64 zeros were in their
place (and in a PNG the CRC of that chunk was another). A TIFF's header of 16 bytes, which is written last, counts last.
So no byte of the file can change without being noticed, neither of the picture nor of what is said about it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import BinaryIO

from linfusion_cli.core.errors import DataError
from linfusion_cli.images.metadata.metadata import NO_DIGITS
from linfusion_cli.images.read.file_info import FileInfo
from linfusion_cli.images.read.info import read_info, reading
from linfusion_cli.images.write.ifd import HEADER_BYTES

PIECE_BYTES = 1 << 20


def verify_image(path: str | os.PathLike[str]) -> FileInfo:
    """Decodes every tile, strip or row of a TIFF (its first page), PNG or JPEG, a few at a time, and checks the
    checksum that it carries; `file_sha256` is None in the answer if it carries none, as files of other software.

    Raises InputMissing when there is no file to read, and DataError for whatever is wrong with it. What is lossy or has
    no checksum of its own (JPEG, LZW, no compression) may decode to another picture: only the checksum notices.
    """
    found = read_info(path)
    with reading(found.path):
        _decode(found)
        if found.file_sha256:
            _check_sum(found)
    return found


def _decode(found: FileInfo) -> None:
    if found.format == "tiff":
        from linfusion_cli.images.verify.tiff import decode_tiff

        decode_tiff(found.path)
    elif found.format == "png":
        from linfusion_cli.images.verify.png import decode_png

        decode_png(found.path)
    else:
        from linfusion_cli.images.read.source import decode_source

        decode_source(found.path)


def _check_sum(found: FileInfo) -> None:
    sha256 = hashlib.sha256()
    for piece in _as_counted(found):
        sha256.update(piece)
    digits = sha256.hexdigest()
    if digits != found.file_sha256:
        raise DataError(
            f"{found.path} is not what was written: its checksum is {digits}, not the one that it carries.",
            "It is damaged, or another program has changed it.",
        )


def _as_counted(found: FileInfo) -> Iterator[bytes]:
    """The file, piece by piece, as the rule of the checksum wants it."""
    digits_at, header = found.file_sha256_at, HEADER_BYTES if found.format == "tiff" else 0
    with found.path.open("rb") as file:
        yield from _between(file, header, digits_at)
        yield NO_DIGITS.encode()
        rest_at = digits_at + len(NO_DIGITS)
        if found.format == "png":
            from linfusion_cli.images.verify.png import rest_of_chunk

            rest = rest_of_chunk(file, digits_at)
            yield rest
            rest_at += len(rest)
        yield from _between(file, rest_at, found.file_bytes)
        yield from _between(file, 0, header)


def _between(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    file.seek(begin)
    while begin < end:
        piece = file.read(min(PIECE_BYTES, end - begin))
        if not piece:
            raise EOFError("it became shorter while it was read")
        begin += len(piece)
        yield piece
