"""What a picture file says about itself."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linfusion_cli.core.errors import DataError
from linfusion_cli.images.metadata.metadata import CHECKSUM, NO_DIGITS

# Any characters: a damaged digit must not pass for a file without a checksum.
SEAL = re.compile(rf'{{"{CHECKSUM}": "(.{{{len(NO_DIGITS)}}})"', re.DOTALL)


@dataclass(frozen=True)
class FileInfo:
    """A complete picture file: its format (tiff, png or jpeg), size in pixels, bits per sample, tile `(width, height)`
    in pixels, compression by name, resolution in dots per inch, and the request and A1111 parameters it carries.

    `file_sha256` is the checksum it carries and `file_sha256_at` the byte at which its digits begin; `verify` has the
    rule, `read_info` does not compute it."""

    path: Path
    format: str
    width_px: int
    height_px: int
    bits: int
    tile_px: tuple[int, int] | None
    compression: str
    dpi: float | None
    file_bytes: int
    request: dict[str, Any] | None
    parameters: str | None
    file_sha256: str | None
    file_sha256_at: int | None


def truncated(path: Path, what: str) -> DataError:
    """The error for a file that ends too early."""
    return DataError(f"{path} is cut off: {what}.", "Make or copy it again.")


def parse_request(text: str | None) -> dict[str, Any] | None:
    """The request in `text`, or None when other software wrote it."""
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return {key: item for key, item in value.items() if key != CHECKSUM} if isinstance(value, dict) else None


def parse_checksum(text: str | None) -> str | None:
    """The checksum of the file in `text`, also when the request after it is damaged."""
    found = SEAL.match(text or "")
    return found[1] if found else None
