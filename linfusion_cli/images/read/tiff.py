"""TIFF files, tag by tag."""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from linfusion_cli.images.metadata.metadata import DIGITS_AT
from linfusion_cli.images.metadata.xmp import xmp_user_comment
from linfusion_cli.images.read.file_info import FileInfo, parse_checksum, parse_request, truncated
from linfusion_cli.images.write.tiff import DESCRIPTION

NAMES = {1: "none", 5: "lzw", 6: "jpeg", 7: "jpeg", 8: "deflate", 32946: "deflate", 50000: "zstd"}
DPI_PER_UNIT = {2: 1.0, 3: 2.54}


def read_tiff(path: Path) -> FileInfo:
    """Raises DataError when the directory or a tile lies past the end of the file, ValueError and the like when it is
    malformed."""
    import tifffile

    file_bytes = path.stat().st_size
    try:
        with silent_tifffile(), tifffile.TiffFile(path) as file:
            page = file.pages[0]
            _check_data(path, page, file_bytes)
            _check_values(path, file, page.offset, file_bytes)
            return _info(path, page, file_bytes)
    except tifffile.TiffFileError as error:
        raise truncated(path, f"it has no directory of its tiles ({error})") from error
    except IndexError as error:
        raise truncated(path, "it has no directory of its tiles") from error


@contextmanager
def silent_tifffile() -> Iterator[None]:
    """tifffile logs what is wrong before it raises, and a library prints nothing."""
    logger = logging.getLogger("tifffile")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_data(path: Path, page: Any, file_bytes: int) -> None:
    down, across = -(-page.imagelength // page.chunks[0]), -(-page.imagewidth // page.chunks[1])
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    offsets, counts = page.dataoffsets, page.databytecounts
    if len(offsets) != len(counts) or len(counts) < down * across * planes or 0 in offsets or 0 in counts:
        raise truncated(path, "tiles are missing")
    if max(map(sum, zip(offsets, counts, strict=True))) > file_bytes:
        raise truncated(path, "tiles lie past its end")


def _check_values(path: Path, file: Any, directory_offset: int, file_bytes: int) -> None:
    """tifffile leaves out tags whose values lie past the end, so look at the entries themselves."""
    import tifffile

    form, handle = file.tiff, file.filehandle
    handle.seek(directory_offset)
    (entries,) = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))
    for _ in range(entries):
        entry = handle.read(form.tagsize)
        _, kind = struct.unpack(form.tagformat1, entry[:4])
        count, value = struct.unpack(form.tagformat2, entry[4:])
        size = count * struct.calcsize(tifffile.TIFF.DATA_FORMATS.get(kind, "0s"))
        if size > form.tagoffsetthreshold and struct.unpack(form.offsetformat, value)[0] + size > file_bytes:
            raise truncated(path, "metadata lie past its end")


def _info(path: Path, page: Any, file_bytes: int) -> FileInfo:
    checksum = parse_checksum(page.description)
    return FileInfo(
        path=path,
        format="tiff",
        width_px=page.imagewidth,
        height_px=page.imagelength,
        bits=int(page.bitspersample),
        tile_px=(page.tilewidth, page.tilelength) if page.is_tiled else None,
        compression=NAMES.get(int(page.compression), str(int(page.compression))),
        dpi=_dpi(page),
        file_bytes=file_bytes,
        request=parse_request(page.description),
        parameters=_parameters(page.tags.valueof(700)),
        file_sha256=checksum,
        file_sha256_at=page.tags[DESCRIPTION].valueoffset + DIGITS_AT if checksum else None,
    )


def _dpi(page: Any) -> float | None:
    numerator, denominator = page.tags.valueof(282) or (0, 0)
    factor = DPI_PER_UNIT.get(int(page.tags.valueof(296) or 2))
    return round(numerator / denominator * factor, 2) if denominator and factor else None


def _parameters(packet: Any) -> str | None:
    try:
        return xmp_user_comment(packet) if isinstance(packet, bytes) else None
    except ElementTree.ParseError:
        return None
