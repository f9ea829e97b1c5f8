"""A picture that a user has, read from top to bottom in bounded memory."""

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
from linfusion_cli.images.read.colour import to_srgb
from linfusion_cli.images.read.info import MAGIC_BYTES, format_of, reading
from linfusion_cli.images.read.source_tiff import bytes_held_by_tiff

MAX_SIDE_PX = 1_000_000
# Some files can only be decoded whole. 2 GiB lets the largest WebP pass, and 16384 x 16384 in the other formats.
MAX_HELD_BYTES = 2 << 30
BAND_ROWS, BAND_PX = 256, 1 << 23  # bands of pictures wider than 32768 px are lower
FETCH_PX = 1 << 20  # decoded at a time: the numbers of a whole band would wait in memory twice
BITS = {"uchar": 8, "ushort": 16}
EVERY_LOG_LEVEL = 0xFF  # GLib's, with its flags for what is fatal or recursive
COLOUR_CHANNELS = {"b-w": 1, "grey16": 1, "srgb": 3, "rgb16": 3, "cmyk": 4}
# By EXIF orientation: where the first row and the first column of the stored picture are seen.
ROWS_UPWARDS, COLUMNS_LEFTWARDS, TRANSPOSED = (3, 4, 7, 8), (2, 3, 6, 7), (5, 6, 7, 8)


@dataclass(frozen=True)
class SourceImage:
    """A picture file that can be read: its size in pixels as it is to be seen (EXIF orientation applied), its format
    (png, jpeg, webp or tiff), bits per channel (8 or 16), whether it has an alpha channel, EXIF orientation (1 to 8),
    and how many bytes decoding holds at once because of how the file is stored (0: a few rows)."""

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
        """As it is to be seen."""
        return Size(self.width_px, self.height_px)

    @property
    def stored_size(self) -> Size:
        """As it is stored."""
        return Size(self.height_px, self.width_px) if self.orientation in TRANSPOSED else self.size


def inspect_source(path: str | os.PathLike[str]) -> SourceImage:
    """Reads the header, no pixels; what the file is, its content decides and not its name.

    Raises InputMissing when there is no file to read, and DataError when it is no picture, or none that `source_rows`
    can read: other samples than 8 or 16 bits, other channels than grey, RGB or CMYK (and alpha), sides beyond
    1,000,000 px, one that must be decoded whole and is too large for that, a camera raw file, or a TIFF whose first
    page is not the image.
    """
    path = Path(path)
    with reading(path), _decoding(path):
        with path.open("rb") as file:
            format = format_of(path, file.read(MAGIC_BYTES))
        if format is None:
            raise DataError(f"{path} is not a PNG, JPEG, WebP or TIFF picture.", "Convert it to one of these.")
        held_bytes = bytes_held_by_tiff(path) if format == "tiff" else 0
        image = _opened(path, format)
        return _described(path, format, image, held_bytes or _bytes_held(format, image))


def source_rows(
    source: SourceImage, background: tuple[int, int, int] | None, notify: Callable[[str], None]
) -> Iterator[np.ndarray]:
    """The pixels in sRGB as float32 [n, W, 3] between 0 and 1: bands of the stored picture, from top to bottom.

    A band has 256 rows, or fewer where the picture is very wide or ends. `background` (0 to 255) shows through what is
    transparent; pictures without alpha ignore it. `notify` gets a sentence if the colour profile cannot be used.
    Raises DataError, at the call or between bands: transparency without a background, a damaged or changed file.
    """
    path = source.path
    if source.has_alpha and background is None:
        raise transparent(path)
    if inspect_source(path) != source:
        raise DataError(f"{path} has changed since it was first looked at.", "Start again when it is complete.")
    with reading(path), _decoding(path):
        image = to_srgb(_opened(path, source.format), path, notify)
        return _bands(image, path, background or (0, 0, 0))


def decode_source(path: str | os.PathLike[str]) -> None:
    """Decodes every row, a few at a time, and keeps none; raises as `inspect_source` does, and DataError that says
    where, for data that libvips has any doubt about."""
    source = inspect_source(path)
    with reading(source.path), _decoding(source.path):
        image = _opened(source.path, source.format)
        region, step = _vips().Region.new(image), max(1, FETCH_PX // image.width)
    for top in range(0, image.height, step):
        rows = min(step, image.height - top)
        with reading(source.path), _decoding(source.path, f" from row {top + 1} on"):
            region.fetch(0, top, image.width, rows)


def transparent(path: Path) -> DataError:
    """The error for a picture with alpha and no colour to put behind it."""
    return DataError(f"{path} has transparency.", "Say what is behind it: --background white (or any colour).")


def apply_orientation(read: ReadRegion, image: SourceImage) -> ReadRegion:
    """A reader of the picture as it is to be seen, from a reader of the stored one; both give float32 [h, w, 3]."""
    upwards, leftwards = image.orientation in ROWS_UPWARDS, image.orientation in COLUMNS_LEFTWARDS

    def read_oriented(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        if upwards:
            top, bottom = image.height_px - bottom, image.height_px - top
        if leftwards:
            left, right = image.width_px - right, image.width_px - left
        if image.orientation in TRANSPOSED:
            pixels = read(left, right, top, bottom).swapaxes(0, 1)
        else:
            pixels = read(top, bottom, left, right)
        return np.ascontiguousarray(pixels[:: -1 if upwards else 1, :: -1 if leftwards else 1])

    return read if image.orientation == 1 else read_oriented


@cache
def _vips() -> Any:
    """pyvips, without its cache of operations: that would keep files open, and show what was there before."""
    import pyvips

    pyvips.cache_set_max(0)
    _silence(pyvips)
    return pyvips


def _silence(vips: Any) -> None:
    """Leaves vips' warnings unheard: pyvips' own handler prints a traceback where they quote a damaged file."""
    handler = vips.ffi.callback("GLogFunc", lambda *what: None)
    number = vips.glib_lib.g_log_set_handler(b"VIPS", EVERY_LOG_LEVEL, handler, vips.ffi.NULL)
    # No Python may be called while the interpreter ends. This holds the handler, too: cffi frees what nobody has.
    atexit.register(lambda handler: vips.glib_lib.g_log_remove_handler(b"VIPS", number), handler)


@contextmanager
def _decoding(path: Path, where: str = "") -> Iterator[None]:
    vips = _vips()
    vips.vips_lib.vips_error_clear()  # of what it said about a file before without giving up
    try:
        yield
    except vips.Error as error:
        who, _, what = first_line(Exception(error.detail)).rstrip(".").partition(": ")
        reason = what or "its data are not what they should be"  # sometimes vips says nothing
        raise DataError(
            f"{path} cannot be decoded{where}: {reason}.", "It may be damaged: make or copy it again."
        ) from error


def _opened(path: Path, format: str) -> Any:
    """The file as an image of vips: its header is read, its rows are when they are asked for, in order."""
    load = getattr(_vips().Image, f"{format}load_source")
    # libjpeg calls it a warning when it paints grey what is damaged.
    options: dict[str, Any] = {"access": "sequential", "fail_on": "warning" if format == "jpeg" else "error"}
    if format == "tiff":
        options["unlimited"] = True  # or strips of more than 10 MiB are refused; `bytes_held_by_tiff` sets the limit
    if format == "webp":
        options["memory"] = True  # or a large one waits in a temporary file, where nobody has counted it
    return load(_source(path, format), **options)


def _source(path: Path, format: str) -> Any:
    """Where vips reads from; not a path, for it takes only those that are UTF-8."""
    from_descriptor = _vips().Source.new_from_descriptor
    if format != "jpeg":
        with path.open("rb") as file:
            return from_descriptor(file.fileno())
    # vips maps a JPEG file, and mapped pages count as this program's memory. It cannot map a pipe.
    file = path.open("rb")
    end_to_read, end_to_write = os.pipe()
    try:
        threading.Thread(target=_feed, name="feed", args=(file, end_to_write), daemon=True).start()
        return from_descriptor(end_to_read)
    finally:
        os.close(end_to_read)


def _feed(file: Any, pipe: int) -> None:
    """Copies the file into the pipe, until that is full of what nobody will read or the file ends."""
    with suppress(OSError), open(pipe, "wb", buffering=0) as sink, file:  # noqa: PTH123 - a descriptor is no path
        copyfileobj(file, sink)


def _described(path: Path, format: str, image: Any, held_bytes: int) -> SourceImage:
    _check_samples(path, image)
    side = max(image.width, image.height)
    if side > MAX_SIDE_PX:
        raise DataError(f"{path} is {image.width}x{image.height} px.", f"Use sides up to {MAX_SIDE_PX} px.")
    if held_bytes > MAX_HELD_BYTES:
        reason = f"{path} is stored so that {held_bytes >> 20} MiB of it must be decoded at once."
        raise DataError(reason, "Save it without interlacing or progression, or as a TIFF with strips or small tiles.")
    orientation = image.get("orientation") if image.get_typeof("orientation") else 1
    seen = (image.height, image.width) if orientation in TRANSPOSED else (image.width, image.height)
    has_alpha = image.bands > COLOUR_CHANNELS[image.interpretation]
    return SourceImage(path, format, *seen, BITS[image.format], has_alpha, orientation, held_bytes)


def _check_samples(path: Path, image: Any) -> None:
    if image.format not in BITS:
        raise DataError(f"{path} has samples of the kind {image.format}.", "Convert it to 8 or 16 bits per channel.")
    if image.bands - COLOUR_CHANNELS.get(image.interpretation, image.bands + 1) not in (0, 1):
        reason = f"{path} has {image.bands} channels in the colour space {image.interpretation}."
        raise DataError(reason, "Convert it to RGB.")


def _bytes_held(format: str, image: Any) -> int:
    """What PNG, JPEG and WebP hold at once: nothing, but the whole picture if each of several passes refines it."""
    samples = image.width * image.height * image.bands
    if format == "webp":
        return 2 * image.width * image.height * 4  # the frame, and the canvas it is put on
    if image.get_typeof("interlaced") or (image.get_typeof("jpeg-multiscan") and image.get("jpeg-multiscan")):
        return samples * (2 if format == "jpeg" else BITS.get(image.format, 8) // 8)  # a coefficient has 16 bits
    return 0


def _bands(image: Any, path: Path, background: tuple[int, int, int]) -> Iterator[np.ndarray]:
    region = _vips().Region.new(image)
    rows = min(BAND_ROWS, max(1, BAND_PX // image.width))
    for top in range(0, image.height, rows):
        band = np.empty((min(rows, image.height - top), image.width, 3), np.float32)
        with reading(path), _decoding(path):
            _fill(band, region, image, top, background)
        yield band


def _fill(band: np.ndarray, region: Any, image: Any, top: int, background: tuple[int, int, int]) -> None:
    """The rows of `image` from `top` on into `band`."""
    step = min(len(band), max(1, FETCH_PX // image.width))
    for at in range(0, len(band), step):
        piece = band[at : at + step]
        fetched = region.fetch(0, top + at, image.width, len(piece))
        dtype = f"u{BITS[image.format] // 8}"
        numbers = np.frombuffer(fetched, dtype).reshape(len(piece), image.width, image.bands)
        full_scale = np.iinfo(dtype).max
        np.divide(numbers[..., :3], full_scale, out=piece, dtype=np.float32)
        if image.bands > 3:
            behind = np.asarray(background, np.float32) / 255
            piece -= behind
            piece *= np.divide(numbers[..., 3:], full_scale, dtype=np.float32)
            piece += behind
