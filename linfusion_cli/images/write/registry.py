"""From the name of a format to the sink that writes it."""

import os
from pathlib import Path

from linfusion_cli.core.atomic_file import AtomicFile
from linfusion_cli.core.errors import UsageError
from linfusion_cli.images.metadata.metadata import ImageInfo
from linfusion_cli.images.write.sink import RowSink

FORMATS = ("tiff", "png", "jpeg")
SUFFIXES = {".tif": "tiff", ".tiff": "tiff", ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}
COMPRESSIONS = {
    "tiff": ("deflate", "zstd", "lzw", "jpeg", "none"),
    "png": ("deflate",),
    "jpeg": ("jpeg",),
}
BITS = {"tiff": (8, 16), "png": (8, 16), "jpeg": (8,)}
METADATA_BYTES = 1 << 20
# What noise, the worst picture, can grow to: deflate stores what it cannot shrink and adds 5 bytes per 16 KiB; LZW
# spends up to 12 bits on a byte; JPEG at quality 100 spends up to 1.3 times the bytes on noise.
WORST_GROWTH = {"deflate": 1.002, "zstd": 1.002, "none": 1.0, "lzw": 1.5, "jpeg": 1.4}


def format_for(path: str | os.PathLike[str], format: str | None = None) -> str:
    """The format by name, or else by suffix; raises UsageError that names the choices."""
    if format is not None:
        if format not in FORMATS:
            raise UsageError(f"--format {format!r} is unknown.", f"Use one of {', '.join(FORMATS)}.")
        return format
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"{Path(path).name!r} does not say which format it has.",
            f"End the name in one of {', '.join(SUFFIXES)}, or use --format {'|'.join(FORMATS)}.",
        )
    return SUFFIXES[suffix]


def bytes_needed(format: str, size_px: tuple[int, int], bits: int, compression: str | None = None) -> int:
    """An upper bound of the file's bytes: what noise would take, which compresses worse than any photograph.

    Photographs take about half of it. TIFF counts whole tiles, PNG a filter byte per row; metadata is taken
    as 1 MiB. Raises UsageError for a combination that `open_sink` would refuse.
    """
    compression = _checked(format, size_px, bits, compression)
    width_px, height_px = size_px
    if format == "tiff":
        from linfusion_cli.images.write.tiff import tile_px

        width_px, height_px = (-(-side // tile) * tile for side, tile in zip(size_px, tile_px(size_px), strict=True))
    raw = (width_px * 3 * bits // 8 + 1) * height_px
    return int(raw * WORST_GROWTH[compression]) + METADATA_BYTES


def hold(
    path: str | os.PathLike[str],
    format: str,
    size_px: tuple[int, int],
    bits: int,
    compression: str | None = None,
    overwrite: bool = False,
) -> AtomicFile:
    """The file of a picture of `size_px` (width, height), nobody else's from now on, checked as far as can be.

    Raises UsageError for a combination no format has, CannotCreate, TryAgain and WriteFailed as PendingFile does.
    """
    return AtomicFile(path, overwrite, bytes_needed(format, size_px, bits, compression))


def open_sink(
    target: str | os.PathLike[str] | AtomicFile,
    format: str,
    size_px: tuple[int, int],
    bits: int,
    info: ImageInfo,
    compression: str | None = None,
    jpeg_quality: int = 95,
    overwrite: bool = False,
    threads: int | None = None,
) -> RowSink:
    """A sink for a picture, to a path or to a file that is held already; raises as `hold` does.

    `threads` compress; without it, min(8, the CPUs this process may use).
    """
    compression = _checked(format, size_px, bits, compression)
    if not 1 <= jpeg_quality <= 100:
        raise UsageError(f"JPEG quality {jpeg_quality} is out of range.", "Use 1 to 100.")
    held = isinstance(target, AtomicFile)
    pending = target if held else hold(target, format, size_px, bits, compression, overwrite)
    try:
        return _sink(pending, format, size_px, bits, info, compression, jpeg_quality, threads)
    except BaseException:
        pending.abort()
        raise


def _sink(
    pending: AtomicFile,
    format: str,
    size_px: tuple[int, int],
    bits: int,
    info: ImageInfo,
    compression: str,
    jpeg_quality: int,
    threads: int | None,
) -> RowSink:
    if format == "png":
        from linfusion_cli.images.write.png import PngSink

        return PngSink(pending, size_px, bits, info, threads)
    if format == "jpeg":
        from linfusion_cli.images.write.jpeg import JpegSink

        return JpegSink(pending, size_px, info, jpeg_quality, threads)
    from linfusion_cli.images.write.tiff import TiffSink

    return TiffSink(pending, size_px, bits, info, compression, jpeg_quality, threads)


def _checked(format: str, size_px: tuple[int, int], bits: int, compression: str | None) -> str:
    """The compression in use; raises UsageError for what cannot be written."""
    format_for("", format)
    if min(size_px) < 1:
        raise UsageError(f"A picture of {size_px[0]}x{size_px[1]} has no pixels.", "Use sides of 1 px or more.")
    if compression is not None and compression not in COMPRESSIONS[format]:
        choices = ", ".join(COMPRESSIONS[format])
        raise UsageError(f"{format} has no compression {compression!r}.", f"Use one of {choices}.")
    if format == "jpeg":
        from linfusion_cli.images.write.jpeg import check_jpeg_size

        check_jpeg_size(size_px)
        compression = "jpeg"
    allowed = (8,) if compression == "jpeg" else BITS[format]
    if bits not in allowed:
        raise UsageError(f"{bits} bits do not go with {compression or format}.", f"Use {allowed[-1]}.")
    return compression or "deflate"
