"""Reading the tags of TIFF files."""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from linfusion_cli.images.metadata.metadata import CHECKSUM_OFFSET
from linfusion_cli.images.metadata.xmp import parse_xmp_user_comment
from linfusion_cli.images.read.file_info import FileInfo, build_truncation_error, parse_checksum, parse_request
from linfusion_cli.images.write.tiff import DESCRIPTION_TAG

COMPRESSION_NAMES = {1: "none", 5: "lzw", 6: "jpeg", 7: "jpeg", 8: "deflate", 32946: "deflate", 50000: "zstd"}
DPI_PER_UNIT = {2: 1.0, 3: 2.54}


def read_tiff(path: Path) -> FileInfo:
    """Read the first page of a TIFF.

    Raise DataError if the directory or a tile is beyond the end of the file, an exception of MALFORMED if the file is
    malformed.
    """
    import tifffile

    file_bytes = path.stat().st_size
    try:
        with silence_tifffile(), tifffile.TiffFile(path) as file:
            page = file.pages[0]
            _check_data(path, page, file_bytes)
            _check_values(path, file, page.offset, file_bytes)
            return _build_info(path, page, file_bytes)
    except tifffile.TiffFileError as error:
        raise build_truncation_error(path, f"it has no directory ({error})") from error
    except IndexError as error:
        raise build_truncation_error(path, "it has no directory") from error


@contextmanager
def silence_tifffile() -> Iterator[None]:
    """Suppress the log messages of tifffile; errors are raised as well."""
    logger = logging.getLogger("tifffile")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_data(path: Path, page: Any, file_bytes: int) -> None:
    """Raise DataError if tiles are missing or beyond the end of the file."""
    down, across = -(-page.imagelength // page.chunks[0]), -(-page.imagewidth // page.chunks[1])
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    offsets, counts = page.dataoffsets, page.databytecounts
    if len(offsets) != len(counts) or len(counts) < down * across * planes or 0 in offsets or 0 in counts:
        raise build_truncation_error(path, "tiles are missing")
    if max(map(sum, zip(offsets, counts, strict=True))) > file_bytes:
        raise build_truncation_error(path, "tiles are beyond its end")


def _check_values(path: Path, file: Any, directory_offset: int, file_bytes: int) -> None:
    """Raise DataError if a tag has its value beyond the end of the file; tifffile silently skips such tags."""
    import tifffile

    layout, handle = file.tiff, file.filehandle
    handle.seek(directory_offset)
    (entries,) = struct.unpack(layout.tagnoformat, handle.read(layout.tagnosize))
    for _ in range(entries):
        entry = handle.read(layout.tagsize)
        _, kind = struct.unpack(layout.tagformat1, entry[:4])
        count, value = struct.unpack(layout.tagformat2, entry[4:])
        size = count * struct.calcsize(tifffile.TIFF.DATA_FORMATS.get(kind, "0s"))
        if size > layout.tagoffsetthreshold and struct.unpack(layout.offsetformat, value)[0] + size > file_bytes:
            raise build_truncation_error(path, "metadata are beyond its end")


def _build_info(path: Path, page: Any, file_bytes: int) -> FileInfo:
    checksum = parse_checksum(page.description)
    return FileInfo(
        path=path,
        format="tiff",
        width_px=page.imagewidth,
        height_px=page.imagelength,
        bits=int(page.bitspersample),
        tile_px=(page.tilewidth, page.tilelength) if page.is_tiled else None,
        compression=COMPRESSION_NAMES.get(int(page.compression), str(int(page.compression))),
        dpi=_parse_dpi(page),
        file_bytes=file_bytes,
        request=parse_request(page.description),
        parameters=_parse_parameters(page.tags.valueof(700)),
        file_sha256=checksum,
        file_sha256_at=page.tags[DESCRIPTION_TAG].valueoffset + CHECKSUM_OFFSET if checksum else None,
    )


def _parse_dpi(page: Any) -> float | None:
    numerator, denominator = page.tags.valueof(282) or (0, 0)
    factor = DPI_PER_UNIT.get(int(page.tags.valueof(296) or 2))
    return round(numerator / denominator * factor, 2) if denominator and factor else None


def _parse_parameters(packet: Any) -> str | None:
    try:
        return parse_xmp_user_comment(packet) if isinstance(packet, bytes) else None
    except ElementTree.ParseError:
        return None
