"""What a picture file says about itself."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linfusion_cli.errors import DataError


@dataclass(frozen=True)
class FileInfo:
    """A complete picture file: its format (tiff, png or jpeg), size in pixels, bits per sample, tile `(width, height)`
    in pixels, compression by name, resolution in dots per inch, and the request and A1111 parameters it carries."""

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


def truncated(path: Path, what: str) -> DataError:
    """The error for a file that ends too early."""
    return DataError(f"{path} is cut off: {what}.", "Make or copy it again.")


def parse_request(text: str | bytes | None) -> dict[str, Any] | None:
    """The request in `text`, or None when other software wrote it."""
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
