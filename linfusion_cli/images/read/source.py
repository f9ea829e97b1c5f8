"""Reading an input image from top to bottom in bounded memory."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import copyfileobj
from typing import Any

import numpy as np

from linfusion_cli.core.errors import DataError, first_line
from linfusion_cli.core.geometry import Size
from linfusion_cli.images.process.resize import ReadRegion
from linfusion_cli.images.read.colour import convert_to_srgb
from linfusion_cli.images.read.info import MAGIC_BYTES, detect_image_format, translate_read_errors
from linfusion_cli.images.read.source_tiff import compute_tiff_held_bytes

MAX_SIDE_PX = 1_000_000
# Some files can only be decoded at once. 2 GiB are enough for the largest WebP and for 16384x16384 in other formats.
MAX_HELD_BYTES = 2 << 30
BAND_ROWS, BAND_PX = 256, 1 << 23  # images wider than 32768 px have lower bands
FETCH_PX = 1 << 20  # decoded per call: fetching a whole band would hold its pixels twice
BITS = {"uchar": 8, "ushort": 16}
ALL_LOG_LEVELS = 0xFF  # of GLib, including the flags for fatal and recursive messages
COLOUR_CHANNELS = {"b-w": 1, "grey16": 1, "srgb": 3, "rgb16": 3, "cmyk": 4}
# EXIF orientations with rows from bottom to top, with columns from right to left, and with both axes swapped.
FLIPPED_ROWS, FLIPPED_COLUMNS, TRANSPOSED = (3, 4, 7, 8), (2, 3, 6, 7), (5, 6, 7, 8)


@dataclass(frozen=True)
class SourceImage:
    """An input image that can be read.

    format: png, jpeg, webp or tiff; width_px, height_px: with the EXIF orientation applied; bits: per channel, 8 or 16;
    orientation: the EXIF orientation, 1 to 8; held_bytes: the memory that the storage layout requires for decoding,
    0 if a few rows are enough.
    """

    path: Path
    format: str
    width_px: int
    height_px: int
    bits: int
    has_alpha: bool
    orientation: int
    held_bytes: int = 0

    @property
    def size(self) -> Size:
        """The size with the EXIF orientation applied."""
        return Size(self.width_px, self.height_px)

    @property
    def stored_size(self) -> Size:
        """The size without the EXIF orientation."""
        return Size(self.height_px, self.width_px) if self.orientation in TRANSPOSED else self.size


def inspect_source(path: str | os.PathLike[str]) -> SourceImage:
    """Read the header of an image, but no pixels. The format is detected by content; the file name does not matter.

    Raise InputNotFound if the file does not exist or is not readable. Raise DataError if it is not an image, or is one
    that `read_source_rows` does not support: samples other than 8 or 16 bits, channels other than grey, RGB or CMYK
    (with or without alpha), sides over 1,000,000 px, more than MAX_HELD_BYTES to decode at once, a camera raw file, or
    a TIFF with something else than the image on its first page.
    """
    path = Path(path)
    with translate_read_errors(path), _translate_vips_errors(path):
        with path.open("rb") as file:
            format = detect_image_format(path, file.read(MAGIC_BYTES))
        if format is None:
            raise DataError(f"{path} is not a PNG, JPEG, WebP or TIFF image.", "Convert it to one of these.")
        held_bytes = compute_tiff_held_bytes(path) if format == "tiff" else 0
        image = _open_image(path, format)
        return _build_source_image(path, format, image, held_bytes or _compute_held_bytes(format, image))


def read_source_rows(
    source: SourceImage, background: tuple[int, int, int] | None, notify: Callable[[str], None]
) -> Iterator[np.ndarray]:
    """Return an iterator over bands of sRGB pixels, float32 [n, W, 3] in [0, 1], from top to bottom as stored.

    A band has up to 256 rows, fewer if the image is very wide. Transparent parts get the colour `background` (0 to
    255), which is ignored without an alpha channel. An unusable colour profile is reported to `notify`.
    Raise DataError, at the call or between bands, if the image has transparency and `background` is None, or if the
    file is damaged or has changed.
    """
    path = source.path
    if source.has_alpha and background is None:
        raise build_transparency_error(path)
    if inspect_source(path) != source:
        raise DataError(f"{path} was modified during the run.", "Start again when the file is complete.")
    with translate_read_errors(path), _translate_vips_errors(path):
        image = convert_to_srgb(_open_image(path, source.format), path, notify)
        return _read_bands(image, path, background or (0, 0, 0))


def decode_source(path: str | os.PathLike[str]) -> None:
    """Decode all rows, a few at a time, and discard them.

    Raise the errors of `inspect_source`, and DataError with the row for data on which libvips reports a problem.
    """
    source = inspect_source(path)
    with translate_read_errors(source.path), _translate_vips_errors(source.path):
        image = _open_image(source.path, source.format)
        region, step = _load_vips().Region.new(image), max(1, FETCH_PX // image.width)
    for top in range(0, image.height, step):
        rows = min(step, image.height - top)
        with translate_read_errors(source.path), _translate_vips_errors(source.path, f" from row {top + 1}"):
            region.fetch(0, top, image.width, rows)


def build_transparency_error(path: Path) -> DataError:
    """Return the error for an image with transparency and no background colour."""
    return DataError(f"{path} has transparency.", "Set a background colour, e.g. --background white.")


def apply_orientation(read: ReadRegion, image: SourceImage) -> ReadRegion:
    """Wrap `read`, which returns regions of the stored image, to return regions with the EXIF orientation applied."""
    flip_rows, flip_columns = image.orientation in FLIPPED_ROWS, image.orientation in FLIPPED_COLUMNS

    def read_oriented(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        if flip_rows:
            top, bottom = image.height_px - bottom, image.height_px - top
        if flip_columns:
            left, right = image.width_px - right, image.width_px - left
        if image.orientation in TRANSPOSED:
            pixels = read(left, right, top, bottom).swapaxes(0, 1)
        else:
            pixels = read(top, bottom, left, right)
        return np.ascontiguousarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])

    return read if image.orientation == 1 else read_oriented


@cache
def _load_vips() -> Any:
    """Import pyvips and disable its operation cache, which keeps files open and returns outdated pixels."""
    import pyvips

    pyvips.cache_set_max(0)
    _suppress_warnings(pyvips)
    return pyvips


def _suppress_warnings(vips: Any) -> None:
    """Discard the warnings of libvips: pyvips' handler prints a traceback if they contain invalid UTF-8."""
    handler = vips.ffi.callback("GLogFunc", lambda *_: None)
    handler_id = vips.glib_lib.g_log_set_handler(b"VIPS", ALL_LOG_LEVELS, handler, vips.ffi.NULL)
    # C must not call into Python while the interpreter shuts down. The reference keeps cffi from freeing `handler`.
    atexit.register(lambda handler: vips.glib_lib.g_log_remove_handler(b"VIPS", handler_id), handler)


@contextmanager
def _translate_vips_errors(path: Path, where: str = "") -> Iterator[None]:
    vips = _load_vips()
    vips.vips_lib.vips_error_clear()  # messages of earlier files that did not raise
    try:
        yield
    except vips.Error as error:
        _, _, detail = first_line(Exception(error.detail)).rstrip(".").partition(": ")
        reason = detail or "the data are invalid"  # libvips does not always give a reason
        raise DataError(
            f"{path} cannot be decoded{where}: {reason}.", "It may be damaged. Copy or export it again."
        ) from error


def _open_image(path: Path, format: str) -> Any:
    """Open the file as a pyvips image: the header is read now, the rows in order on demand."""
    load = getattr(_load_vips().Image, f"{format}load_source")
    # libjpeg replaces damaged parts by grey and only warns.
    options: dict[str, Any] = {"access": "sequential", "fail_on": "warning" if format == "jpeg" else "error"}
    if format == "tiff":
        options["unlimited"] = True  # allows strips over 10 MiB; `compute_tiff_held_bytes` has the limit
    if format == "webp":
        options["memory"] = True  # otherwise libvips decodes large images to a temporary file
    return load(_open_source(path, format), **options)


def _open_source(path: Path, format: str) -> Any:
    """Return a pyvips source of a file descriptor, because libvips accepts only paths in UTF-8."""
    from_descriptor = _load_vips().Source.new_from_descriptor
    if format != "jpeg":
        with path.open("rb") as file:
            return from_descriptor(file.fileno())
    # libvips memory-maps JPEG files, and mapped pages count as memory of this process. A pipe cannot be mapped.
    file = path.open("rb")
    read_end, write_end = os.pipe()
    try:
        threading.Thread(target=_copy_to_pipe, name="jpeg-pipe", args=(file, write_end), daemon=True).start()
        return from_descriptor(read_end)
    finally:
        os.close(read_end)


def _copy_to_pipe(file: Any, pipe: int) -> None:
    """Copy the file to the pipe until the end of the file, or until the reader closes the pipe."""
    with suppress(OSError), open(pipe, "wb", buffering=0) as sink, file:  # noqa: PTH123 - a file descriptor
        copyfileobj(file, sink)


def _build_source_image(path: Path, format: str, image: Any, held_bytes: int) -> SourceImage:
    _check_samples(path, image)
    side = max(image.width, image.height)
    if side > MAX_SIDE_PX:
        size = f"{image.width}x{image.height}"
        raise DataError(f"{path} is {size} px; the limit is {MAX_SIDE_PX} px per side.", "Make it smaller.")
    if held_bytes > MAX_HELD_BYTES:
        limit = f"the limit is {MAX_HELD_BYTES >> 20} MiB"
        reason = f"Decoding {path} requires {held_bytes >> 20} MiB at once; {limit}."
        raise DataError(
            reason, "Save it as a non-interlaced PNG, a baseline JPEG, or a TIFF with strips or small tiles."
        )
    orientation = image.get("orientation") if image.get_typeof("orientation") else 1
    size_px = (image.height, image.width) if orientation in TRANSPOSED else (image.width, image.height)
    has_alpha = image.bands > COLOUR_CHANNELS[image.interpretation]
    return SourceImage(path, format, *size_px, BITS[image.format], has_alpha, orientation, held_bytes)


def _check_samples(path: Path, image: Any) -> None:
    if image.format not in BITS:
        reason = f"{path} has unsupported samples: {image.format}."
        raise DataError(reason, "Convert it to 8 or 16 bits per channel.")
    if image.bands - COLOUR_CHANNELS.get(image.interpretation, image.bands + 1) not in (0, 1):
        reason = f"{path} has {image.bands} channels in the colour space {image.interpretation}."
        raise DataError(reason, "Convert it to RGB.")


def _compute_held_bytes(format: str, image: Any) -> int:
    """Return the bytes that decoding a PNG, JPEG or WebP holds at once.

    WebP and interlaced or progressive files need buffers for the whole image, other files a few rows (0 bytes).
    """
    sample_count = image.width * image.height * image.bands
    if format == "webp":
        return 2 * image.width * image.height * 4  # the frame and the canvas
    if image.get_typeof("interlaced") or (image.get_typeof("jpeg-multiscan") and image.get("jpeg-multiscan")):
        return sample_count * (2 if format == "jpeg" else BITS.get(image.format, 8) // 8)  # a coefficient has 16 bits
    return 0


def _read_bands(image: Any, path: Path, background: tuple[int, int, int]) -> Iterator[np.ndarray]:
    region = _load_vips().Region.new(image)
    rows = min(BAND_ROWS, max(1, BAND_PX // image.width))
    for top in range(0, image.height, rows):
        band = np.empty((min(rows, image.height - top), image.width, 3), np.float32)
        with translate_read_errors(path), _translate_vips_errors(path):
            _fill_band(band, region, image, top, background)
        yield band


def _fill_band(band: np.ndarray, region: Any, image: Any, top: int, background: tuple[int, int, int]) -> None:
    """Decode rows of `image` from `top` into `band`, and blend transparent pixels with `background`."""
    step = min(len(band), max(1, FETCH_PX // image.width))
    for start in range(0, len(band), step):
        piece = band[start : start + step]
        fetched = region.fetch(0, top + start, image.width, len(piece))
        dtype = f"u{BITS[image.format] // 8}"
        samples = np.frombuffer(fetched, dtype).reshape(len(piece), image.width, image.bands)
        full_scale = np.iinfo(dtype).max
        np.divide(samples[..., :3], full_scale, out=piece, dtype=np.float32)
        if image.bands > 3:
            blend_colour = np.asarray(background, np.float32) / 255
            piece -= blend_colour
            piece *= np.divide(samples[..., 3:], full_scale, dtype=np.float32)
            piece += blend_colour
