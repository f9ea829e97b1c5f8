"""Decode a TIFF tile by tile or strip by strip, without storing pixels."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from linfusion_cli.core.errors import DataError, first_line
from linfusion_cli.images.read.info import MALFORMED
from linfusion_cli.images.read.source import MAX_HELD_BYTES
from linfusion_cli.images.read.tiff import silence_tifffile
from linfusion_cli.images.write.pool import OrderedPool, count_default_threads

UNCOMPRESSED = 1


def decode_tiff(path: Path) -> None:
    """Decode the tiles of the first page in threads, one per thread at a time, and discard the pixels.

    Raise DataError for the first tile that does not decode to its size, and for tiles over 2 GiB.
    """
    import tifffile

    with silence_tifffile(), tifffile.TiffFile(path) as tiff, path.open("rb") as file:
        page: Any = tiff.pages[0]  # a TiffPage, but tifffile declares TiffFrame, too
        if page.compression == UNCOMPRESSED:
            _check_all(path, page, partial(_check_length, page), threads=1)
        else:
            tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
            check = partial(_check_decodes, page.decode, file.fileno(), tables)
            threads = min(count_default_threads(), MAX_HELD_BYTES // _compute_held_bytes(path, page))
            _check_all(path, page, check, threads)


def _check_all(path: Path, page: Any, check: Callable[[int, int, int], None], threads: int) -> None:
    pool = OrderedPool(threads, lambda _: None)
    kind, count = "tile" if page.is_tiled else "strip", len(page.dataoffsets)

    def check_tile(index: int, offset: int, length: int) -> None:
        try:
            check(index, offset, length)
        except (RuntimeError, *MALFORMED) as error:  # RuntimeError: errors of imagecodecs
            reason = f"{path} is damaged: {kind} {index + 1} of {count} does not decode ({first_line(error)})."
            raise DataError(reason, "Copy or generate it again.") from error

    try:
        for index, (offset, length) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
            pool.submit(check_tile, index, offset, length)
        pool.finish()
    except BaseException:
        pool.cancel()
        raise


def _check_decodes(
    decode: Callable[..., Any], fd: int, tables: dict[str, Any], index: int, offset: int, length: int
) -> None:
    """Raise the error of the codec, or ValueError if the tile has the wrong size."""
    decode(os.pread(fd, length, offset), index, **tables)


def _check_length(page: Any, index: int, offset: int, length: int) -> None:
    """Raise ValueError if an uncompressed tile or strip is too short."""
    rows, columns = page.chunks[:2]
    if not page.is_tiled:
        rows = min(rows, page.imagelength - index % -(-page.imagelength // rows) * rows)
    samples = 1 if page.planarconfig == 2 else page.samplesperpixel
    expected = rows * -(-columns * samples * int(page.bitspersample) // 8)
    if length < expected and not page.is_subsampled:
        raise ValueError(f"it has {length} of {expected} bytes")


def _compute_held_bytes(path: Path, page: Any) -> int:
    """Return the bytes of a tile, compressed and decoded; raise DataError if they exceed MAX_HELD_BYTES."""
    decoded_bytes = page.chunks[0] * page.chunks[1] * page.samplesperpixel * -(-int(page.bitspersample) // 8)
    held_bytes = max(page.databytecounts) + decoded_bytes
    if held_bytes > MAX_HELD_BYTES:
        limit = f"the limit is {MAX_HELD_BYTES >> 20} MiB"
        reason = f"Decoding {path} requires {held_bytes >> 20} MiB at once; {limit}."
        raise DataError(reason, "Save it with strips or small tiles.")
    return held_bytes
