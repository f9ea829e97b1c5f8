"""What a picture file says about itself, without decoding it."""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from linfusion_cli.core.errors import DataError, InputNotFound
from linfusion_cli.images.read.file_info import FileInfo, truncated

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MAGIC_BYTES = 12
JPEG_MAGIC = b"\xff\xd8\xff"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# What the parsers raise on bytes that are not what they should be.
MALFORMED = (ValueError, LookupError, TypeError, ArithmeticError, EOFError, SyntaxError, struct.error)


def read_info(path: str | os.PathLike[str]) -> FileInfo:
    """Reads TIFF, PNG and JPEG of any size in moments: chunks, tags and segments, not pixels.

    Raises InputMissing when there is no file to read, and DataError when it is not a picture, or not all of it: a PNG
    or JPEG without its end mark, a TIFF whose tiles reach past the end of the file.
    """
    path = Path(path)
    with reading(path):
        with path.open("rb") as file:
            magic = file.read(MAGIC_BYTES)
        return _reader(path, magic)(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with the file at `path` becomes an InputMissing or a DataError that names it."""
    try:
        yield
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder.", "Name a picture.") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputNotFound(f"{path} does not exist.") from error
    except PermissionError as error:
        raise InputNotFound(f"{path} may not be read.", "Check its permissions.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except MALFORMED as error:
        raise DataError(f"{path} is damaged: {error}.", "Make or copy it again.") from error


def _reader(path: Path, magic: bytes) -> Callable[[Path], FileInfo]:
    format = format_of(path, magic)
    if format == "png":
        from linfusion_cli.images.read.png import read_png

        return read_png
    if format == "jpeg":
        from linfusion_cli.images.read.jpeg import read_jpeg

        return read_jpeg
    if format == "tiff":
        from linfusion_cli.images.read.tiff import read_tiff

        return read_tiff
    raise DataError(f"{path} is not a TIFF, PNG or JPEG picture.")


def format_of(path: Path, magic: bytes) -> str | None:
    """png, jpeg, webp or tiff, by the first 12 bytes of the file at `path`; None for others, DataError without any."""
    if not any(magic):
        raise truncated(path, "it is empty, or was never finished")
    if magic.startswith(PNG_MAGIC):
        return "png"
    if magic.startswith(JPEG_MAGIC):
        return "jpeg"
    if magic[:4] == b"RIFF" and magic[8:] == b"WEBP":
        return "webp"
    return "tiff" if magic[:4] in TIFF_MAGIC else None
