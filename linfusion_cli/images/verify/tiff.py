"""TIFF files decoded tile by tile (or strip by strip), and nothing kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from linfusion_cli.core.errors import DataError, first_line
from linfusion_cli.images.read.info import MALFORMED
from linfusion_cli.images.read.source import MAX_HELD_BYTES
from linfusion_cli.images.read.tiff import silent_tifffile
from linfusion_cli.images.write.pool import OrderedPool, default_threads

UNCOMPRESSED = 1


def decode_tiff(path: Path) -> None:
    """Decodes the tiles of the first page in threads, one a thread at a time, and none waits in memory.

    Raises DataError that names the first that does not decode to its size, and for tiles of more than 2 GiB.
    """
    import tifffile

    with silent_tifffile(), tifffile.TiffFile(path) as file, path.open("rb") as content:
        page = file.pages[0]
        if page.compression == UNCOMPRESSED:
            _check_all(path, page, partial(_check_length, page), threads=1)
        else:
            tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
            check = partial(_check_decodes, page.decode, content.fileno(), tables)
            _check_all(path, page, check, min(default_threads(), MAX_HELD_BYTES // _bytes_held(path, page)))


def _check_all(path: Path, page: Any, check: Callable[[int, int, int], None], threads: int) -> None:
    pool = OrderedPool(threads, lambda _: None)
    kind, count = "tile" if page.is_tiled else "strip", len(page.dataoffsets)

    def checked(index: int, offset: int, length: int) -> None:
        try:
            check(index, offset, length)
        except (RuntimeError, *MALFORMED) as error:  # RuntimeError is what imagecodecs raises
            reason = f"{path} is damaged: {kind} {index + 1} of {count} does not decode ({first_line(error)})."
            raise DataError(reason, "Make or copy it again.") from error

    try:
        for index, (offset, length) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
            pool.submit(checked, index, offset, length)
        pool.finish()
    except BaseException:
        pool.cancel()
        raise


def _check_decodes(
    decode: Callable[..., Any], content: int, tables: dict[str, Any], index: int, offset: int, length: int
) -> None:
    """Raises what the codec raises, and ValueError if the tile has another size than it should."""
    decode(os.pread(content, length, offset), index, **tables)


def _check_length(page: Any, index: int, offset: int, length: int) -> None:
    rows, columns = page.chunks[:2]
    if not page.is_tiled:
        rows = min(rows, page.imagelength - index % -(-page.imagelength // rows) * rows)
    samples = 1 if page.planarconfig == 2 else page.samplesperpixel
    expected = rows * -(-columns * samples * int(page.bitspersample) // 8)
    if length < expected and not page.is_subsampled:
        raise ValueError(f"it has {length} bytes of {expected}")


def _bytes_held(path: Path, page: Any) -> int:
    """What decoding a tile holds, compressed and not; raises DataError if that is too much."""
    decoded = page.chunks[0] * page.chunks[1] * page.samplesperpixel * -(-int(page.bitspersample) // 8)
    held = max(page.databytecounts) + decoded
    if held > MAX_HELD_BYTES:
        reason = f"{path} is stored so that {held >> 20} MiB of it must be decoded at once."
        raise DataError(reason, "Save it with strips or small tiles.")
    return held
