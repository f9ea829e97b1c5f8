"""The formats of output files, and the creation of their sinks."""

import os
from pathlib import Path

from linfusion_cli.core.atomic_file import AtomicFile
from linfusion_cli.core.errors import UsageError
from linfusion_cli.images.metadata.metadata import ImageInfo
from linfusion_cli.images.write.block_sink import SinkOptions
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
# The growth of noise, which compresses worst: deflate stores incompressible data with 5 extra bytes per 16 KiB, LZW
# uses up to 12 bits per byte, and JPEG at quality 100 produces up to 1.3 times the input.
MAX_GROWTH = {"deflate": 1.002, "zstd": 1.002, "none": 1.0, "lzw": 1.5, "jpeg": 1.4}


def resolve_format(path: str | os.PathLike[str], format: str | None = None) -> str:
    """Return `format`, or the format of the suffix of `path`; raise UsageError if it is unknown."""
    if format is not None:
        if format not in FORMATS:
            raise UsageError(f"--format {format} is not supported.", f"Use one of {', '.join(FORMATS)}.")
        return format
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"The format of {Path(path).name!r} cannot be detected by its suffix.",
            f"Use one of {', '.join(SUFFIXES)}, or --format {'|'.join(FORMATS)}.",
        )
    return SUFFIXES[suffix]


def compute_max_file_bytes(format: str, size_px: tuple[int, int], bits: int, compression: str | None = None) -> int:
    """Return an upper bound of the file size in bytes: the size of noise, with whole tiles and 1 MiB of metadata.

    Photographs take about half of it. Raise UsageError for a combination that `open_sink` rejects.
    """
    compression = _resolve_compression(format, size_px, bits, compression)
    width_px, height_px = size_px
    if format == "tiff":
        from linfusion_cli.images.write.tiff import compute_tile_size

        tile_px = compute_tile_size(size_px)
        width_px, height_px = (-(-side // tile) * tile for side, tile in zip(size_px, tile_px, strict=True))
    raw_bytes = (width_px * 3 * bits // 8 + 1) * height_px  # one byte per row is the filter type of PNG
    return int(raw_bytes * MAX_GROWTH[compression]) + METADATA_BYTES


def create_output_file(
    path: str | os.PathLike[str],
    format: str,
    size_px: tuple[int, int],
    bits: int,
    compression: str | None = None,
    overwrite: bool = False,
) -> AtomicFile:
    """Create and lock the temporary file for an image of `size_px` (width, height).

    Raise UsageError for an unsupported combination, and CannotCreateOutput, TemporaryFailure and WriteFailed as
    AtomicFile does.
    """
    return AtomicFile(path, overwrite, compute_max_file_bytes(format, size_px, bits, compression))


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
    """Open a sink for an image that writes to a path or to an existing AtomicFile.

    `threads` compress; the default is the number of usable CPUs, at most 8. Raise the errors of `create_output_file`.
    """
    compression = _resolve_compression(format, size_px, bits, compression)
    if not 1 <= jpeg_quality <= 100:
        raise UsageError(f"JPEG quality {jpeg_quality} is out of range.", "Use 1 to 100.")
    is_open = isinstance(target, AtomicFile)
    file = target if is_open else create_output_file(target, format, size_px, bits, compression, overwrite)
    try:
        return _create_sink(format, SinkOptions(file, size_px, bits, info, compression, jpeg_quality, threads))
    except BaseException:
        file.abort()
        raise


def _create_sink(format: str, options: SinkOptions) -> RowSink:
    if format == "png":
        from linfusion_cli.images.write.png import PngSink

        return PngSink(options)
    if format == "jpeg":
        from linfusion_cli.images.write.jpeg import JpegSink

        return JpegSink(options)
    from linfusion_cli.images.write.tiff import TiffSink

    return TiffSink(options)


def _resolve_compression(format: str, size_px: tuple[int, int], bits: int, compression: str | None) -> str:
    """Return the compression, deflate by default; raise UsageError for a combination that cannot be written."""
    resolve_format("", format)
    if min(size_px) < 1:
        raise UsageError(f"An image of {size_px[0]}x{size_px[1]} px is empty.", "Use sides of 1 px or more.")
    if compression is not None and compression not in COMPRESSIONS[format]:
        choices = ", ".join(COMPRESSIONS[format])
        raise UsageError(f"--compression {compression} is not supported for {format}.", f"Use one of {choices}.")
    if format == "jpeg":
        from linfusion_cli.images.write.jpeg import check_jpeg_size

        check_jpeg_size(size_px)
        compression = "jpeg"
    allowed = (8,) if compression == "jpeg" else BITS[format]
    if bits not in allowed:
        raise UsageError(f"--bits {bits} is not supported for {compression or format}.", f"Use {allowed[-1]}.")
    return compression or "deflate"
