"""Format detection and file information, without decoding pixels."""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from linfusion_cli.core.errors import DataError, InputNotFound
from linfusion_cli.images.read.file_info import FileInfo, build_truncation_error

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MAGIC_BYTES = 12
JPEG_MAGIC = b"\xff\xd8\xff"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# The exceptions of the parsers for malformed data.
MALFORMED = (ValueError, LookupError, TypeError, ArithmeticError, EOFError, SyntaxError, struct.error)


def read_info(path: str | os.PathLike[str]) -> FileInfo:
    """Read the chunks, tags or segments of a TIFF, PNG or JPEG of any size, but no pixels.

    Raise InputNotFound if the file does not exist or is not readable, and DataError if it is not an image or is
    incomplete: a PNG or JPEG without an end marker, or a TIFF with tiles beyond the end of the file.
    """
    path = Path(path)
    with translate_read_errors(path):
        with path.open("rb") as file:
            magic = file.read(MAGIC_BYTES)
        return _find_reader(path, magic)(path)


@contextmanager
def translate_read_errors(path: Path) -> Iterator[None]:
    """Convert I/O and parser errors to InputNotFound or DataError with the path."""
    try:
        yield
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder.", "Use an image file.") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputNotFound(f"{path} does not exist.") from error
    except PermissionError as error:
        raise InputNotFound(f"{path} is not readable.", "Check its permissions.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except MALFORMED as error:
        raise DataError(f"{path} is damaged: {error}.", "Copy or generate it again.") from error


def _find_reader(path: Path, magic: bytes) -> Callable[[Path], FileInfo]:
    format = detect_image_format(path, magic)
    if format == "png":
        from linfusion_cli.images.read.png import read_png

        return read_png
    if format == "jpeg":
        from linfusion_cli.images.read.jpeg import read_jpeg

        return read_jpeg
    if format == "tiff":
        from linfusion_cli.images.read.tiff import read_tiff

        return read_tiff
    raise DataError(f"{path} is not a TIFF, PNG or JPEG image.")


def detect_image_format(path: Path, magic: bytes) -> str | None:
    """Return png, jpeg, webp or tiff by the first 12 bytes of the file at `path`, or None for any other format.

    Raise DataError if the file is empty or begins with zeros.
    """
    if not any(magic):
        raise build_truncation_error(path, "it is empty or incomplete")
    if magic.startswith(PNG_MAGIC):
        return "png"
    if magic.startswith(JPEG_MAGIC):
        return "jpeg"
    if magic[:4] == b"RIFF" and magic[8:] == b"WEBP":
        return "webp"
    return "tiff" if magic[:4] in TIFF_MAGIC else None
