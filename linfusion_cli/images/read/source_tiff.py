"""Checks of an input TIFF: its first page, the only one that is decoded, must be the image itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from linfusion_cli.core.errors import DataError
from linfusion_cli.images.read.file_info import build_truncation_error
from linfusion_cli.images.read.info import MALFORMED

# The compressions that every build of libtiff decodes: none, CCITT, LZW, JPEG, deflate, PackBits.
COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946)
YCBCR, JPEG, OLD_STYLE_JPEG = 6, 7, 6  # libtiff decodes old-style JPEG (TIFF 6.0) to a blank image
REDUCED, MULTI_PAGE, MASK = 1, 2, 4  # bits of NewSubfileType; DNG and TIFF/FX define more
CR2_MAGIC_OFFSET, CR2_MAGIC = 8, b"CR"
DNG_VERSION = 50706
SENSOR_COLOURS = (32803, 34892)  # photometric interpretations: colour filter array, and LinearRaw
MAX_DIRECTORIES = 16  # per chain; cameras write fewer


def compute_tiff_held_bytes(path: Path) -> int:
    """Return the bytes that decoding holds at once: one compressed strip or tile, and the decoded rows around it.

    Raise DataError if the first page is not the image, or has a compression or colours that libtiff decodes wrongly.
    """
    import tifffile

    from linfusion_cli.images.read.tiff import silence_tifffile

    with silence_tifffile(), tifffile.TiffFile(path) as file:
        page = _get_first_page(path, file)
        _check_kind(path, file, page)
        _check_coding(path, page)
        compressed = max(page.databytecounts, default=0) if page.compression != 1 else 0
        row_bytes = page.imagewidth * page.samplesperpixel * -(-int(page.bitspersample) // 8)
        if page.is_tiled:
            return compressed + 2 * page.tilelength * row_bytes
        return compressed + (2 * min(page.rowsperstrip, page.imagelength) * row_bytes if page.planarconfig == 2 else 0)


def _get_first_page(path: Path, file: Any) -> Any:
    try:
        return file.pages[0]
    except IndexError as error:
        raise build_truncation_error(path, "it has no directory") from error


def _check_kind(path: Path, file: Any, page: Any) -> None:
    """Raise DataError if the first page is a thumbnail, sensor data (both in camera raw files) or a mask."""
    sub_pages = list(_iter_directories(page))
    if _is_raw(file, [page, *sub_pages, *_iter_directories(file)]):
        raise DataError(f"{path} is a camera raw file.", "Develop it to TIFF, PNG or JPEG first.")
    kind = page.subfiletype | (REDUCED if page.tags.valueof(255) == 2 else 0)  # 255: SubfileType of TIFF 5.0
    if kind & REDUCED or any(_compute_area(sub_page) > _compute_area(page) for sub_page in sub_pages):
        reason = f"{path} has a reduced-resolution image as its first page, as camera raw files do."
        raise DataError(reason, "Develop it to TIFF, PNG or JPEG first, or save the full image as the first page.")
    if kind & ~MULTI_PAGE:
        content = "a mask" if kind & MASK else f"a part of an image (NewSubfileType {kind})"
        raise DataError(f"{path} has {content} as its first page.", "Save the image itself as the first page.")


def _is_raw(file: Any, directories: Sequence[Any]) -> bool:
    file.filehandle.seek(CR2_MAGIC_OFFSET)
    if file.filehandle.read(len(CR2_MAGIC)) == CR2_MAGIC:
        return True
    return any(entry.photometric in SENSOR_COLOURS or DNG_VERSION in entry.tags for entry in directories)


def _iter_directories(owner: Any) -> Iterator[Any]:
    """Yield the pages of a file or the SubIFDs of a page, up to the first malformed one."""
    with suppress(OSError, *MALFORMED):
        if owner.pages is not None:
            for index in range(MAX_DIRECTORIES):
                yield owner.pages[index]


def _compute_area(page: Any) -> int:
    return page.imagewidth * page.imagelength


def _check_coding(path: Path, page: Any) -> None:
    compression = page.compression
    if compression not in COMPRESSIONS:
        is_old_jpeg = compression == OLD_STYLE_JPEG
        name = "old-style JPEG" if is_old_jpeg else getattr(compression, "name", str(compression))
        reason = f"{path} has an unsupported compression: {name}."
        raise DataError(reason, "Save it with deflate, LZW or no compression.")
    if page.photometric == YCBCR and compression != JPEG:
        raise DataError(f"{path} has YCbCr colours without JPEG compression.", "Convert it to RGB.")
