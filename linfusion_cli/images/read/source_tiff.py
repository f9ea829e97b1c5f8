"""What the directories of a TIFF say of its first page, the one that is decoded: whether it is the image at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from linfusion_cli.core.errors import DataError
from linfusion_cli.images.read.file_info import truncated
from linfusion_cli.images.read.info import MALFORMED

# What libtiff decodes in every build: none, CCITT, LZW, JPEG, deflate, PackBits.
COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946)
YCBCR, JPEG, OLD_STYLE_JPEG = 6, 7, 6  # libtiff decodes the last, of TIFF 6.0, to a blank image
REDUCED, ONE_OF_SEVERAL, MASK = 1, 2, 4  # bits of NewSubfileType; DNG and TIFF/FX have further ones
CR2_MARK_AT, CR2_MARK = 8, b"CR"
DNG_VERSION = 50706
SENSOR_COLOURS = (32803, 34892)  # photometric interpretations: colour filter array, and LinearRaw
MAX_DIRECTORIES = 16  # looked at in each chain: no camera writes as many


def bytes_held_by_tiff(path: Path) -> int:
    """What must be held at once: a compressed strip or tile, and a row of tiles.

    Raises DataError where the first page is not the image, or has a compression or colours that libtiff gets wrong.
    """
    import tifffile

    from linfusion_cli.images.read.tiff import silent_tifffile

    with silent_tifffile(), tifffile.TiffFile(path) as file:
        page = _first_page(path, file)
        _check_kind(path, file, page)
        _check_coding(path, page)
        packed = max(page.databytecounts, default=0) if page.compression != 1 else 0
        row_bytes = page.imagewidth * page.samplesperpixel * -(-int(page.bitspersample) // 8)
        if page.is_tiled:
            return packed + 2 * page.tilelength * row_bytes
        return packed + (2 * min(page.rowsperstrip, page.imagelength) * row_bytes if page.planarconfig == 2 else 0)


def _first_page(path: Path, file: Any) -> Any:
    try:
        return file.pages[0]
    except IndexError as error:
        raise truncated(path, "it has no directory of its strips or tiles") from error


def _check_kind(path: Path, file: Any, page: Any) -> None:
    """Camera raw files have a thumbnail as their first page, or samples of a sensor; others may have a mask there."""
    below = list(_directories(page))
    if _is_raw(file, [page, *below, *_directories(file)]):
        raise DataError(f"{path} is a camera raw file.", "Develop it to TIFF, PNG or JPEG first.")
    kind = page.subfiletype | (REDUCED if page.tags.valueof(255) == 2 else 0)  # 255: SubfileType of TIFF 5.0
    if kind & REDUCED or any(_area(one) > _area(page) for one in below):
        reason = f"{path} has a reduced-resolution image as its first page, as camera raw files do."
        raise DataError(reason, "Develop it to TIFF, PNG or JPEG first, or save the full image as the first page.")
    if kind & ~ONE_OF_SEVERAL:
        what = "a mask" if kind & MASK else f"a part of an image (NewSubfileType {kind})"
        raise DataError(f"{path} has {what} as its first page.", "Save the image itself as the first page.")


def _is_raw(file: Any, directories: Sequence[Any]) -> bool:
    file.filehandle.seek(CR2_MARK_AT)
    if file.filehandle.read(len(CR2_MARK)) == CR2_MARK:
        return True
    return any(one.photometric in SENSOR_COLOURS or DNG_VERSION in one.tags for one in directories)


def _directories(owner: Any) -> Iterator[Any]:
    """The pages of a file or the SubIFDs of a page, as far as they can be read: only the first page is decoded."""
    with suppress(OSError, *MALFORMED):
        if owner.pages is not None:
            for place in range(MAX_DIRECTORIES):
                yield owner.pages[place]


def _area(page: Any) -> int:
    return page.imagewidth * page.imagelength


def _check_coding(path: Path, page: Any) -> None:
    compression = page.compression
    if compression not in COMPRESSIONS:
        old = compression == OLD_STYLE_JPEG
        name = "old-style JPEG" if old else getattr(compression, "name", str(compression))
        raise DataError(f"{path} has the compression {name}.", "Save it with deflate, LZW or no compression.")
    if page.photometric == YCBCR and compression != JPEG:
        raise DataError(f"{path} has YCbCr colours that are not JPEG's.", "Convert it to RGB.")
