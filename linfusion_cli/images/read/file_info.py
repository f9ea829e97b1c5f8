"""Information about an image file, and the parsers of its embedded request."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linfusion_cli.core.errors import DataError
from linfusion_cli.images.metadata.metadata import CHECKSUM_KEY, EMPTY_CHECKSUM

# Any characters match: a file with a damaged digit must not count as a file without a checksum.
CHECKSUM_PATTERN = re.compile(rf'{{"{CHECKSUM_KEY}": "(.{{{len(EMPTY_CHECKSUM)}}})"', re.DOTALL)


@dataclass(frozen=True)
class FileInfo:
    """The properties of an image file.

    format: tiff, png or jpeg; bits: per sample; tile_px: (width, height); dpi: dots per inch; request, parameters: the
    embedded request and A1111 parameters; file_sha256: the embedded checksum, which `read_info` does not verify;
    file_sha256_at: the offset of its first digit in bytes (see `verify.verify`).
    """

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


def build_truncation_error(path: Path, reason: str) -> DataError:
    """Return the error for a file that is incomplete."""
    return DataError(f"{path} is truncated: {reason}.", "Copy or generate it again.")


def parse_request(text: str | None) -> dict[str, Any] | None:
    """Return the request in `text` without its checksum, or None if the text is from other software."""
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return {key: item for key, item in value.items() if key != CHECKSUM_KEY} if isinstance(value, dict) else None


def parse_checksum(text: str | None) -> str | None:
    """Return the checksum in `text`, even if the rest of the request is damaged; None without a checksum."""
    match = CHECKSUM_PATTERN.match(text or "")
    return match[1] if match else None
