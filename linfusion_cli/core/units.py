"""What people write and read: sizes ("16384x8192"), bytes ("12.0 GiB"), seconds, colours, paths."""

import math
import os
import re
from pathlib import Path

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size

MIN_PX = 64
BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_size(text: str, setting: str = "size") -> Size:
    """The Size that "2048" (a square) or "2048x1024" (width x height, in pixels) means; raises UsageError."""
    flag = "--" + setting.replace("_", "-")
    match = re.fullmatch(r"\s*(\d{1,7})\s*(?:[xX×]\s*(\d{1,7})\s*)?", text, re.ASCII)
    if match is None:
        hint = "Write 16384 for a square, or 16384x8192 (width x height)."
        raise UsageError(f"{flag} {text!r} is not a size.", hint, setting)
    width, height = int(match[1]), int(match[2] or match[1])
    if min(width, height) < MIN_PX:
        hint = f"Both sides must be {MIN_PX} pixels or more."
        raise UsageError(f"{flag} {text!r} is too small.", hint, setting)
    return Size(width, height)


def parse_bytes(text: str) -> int:
    """The bytes that "12GiB", "12.5 GB", "800M" or a plain number mean; raises ValueError.

    KiB, MiB, GiB and TiB are powers of 1024, KB, MB, GB and TB of 1000; a single letter means the former.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*(?:([kmgt])?(i?b)?)?\s*", text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise ValueError("is not a size of memory: write 12GiB")
    number, letter, ending = match.groups()
    base = 1000 if letter and (ending or "").lower() == "b" else 1024
    return round(float(number) * base ** ("bkmgt".index(letter.lower()) if letter else 0))


def parse_seconds(text: str) -> float:
    """The seconds that "90", "90s", "50m", "1.5h" or "1h30m" mean; raises ValueError."""
    number = r"(\d{1,9}(?:\.\d{1,6})?)"
    match = re.fullmatch(rf"\s*(?:{number}h)?(?:{number}m)?(?:{number}s?)?\s*", text, re.ASCII | re.IGNORECASE)
    if match is None or not any(match.groups()):
        raise ValueError("is not a time: write 50m, 1h30m or 90s")
    return sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))


def parse_colour(text: str, setting: str = "background") -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a colour as CSS writes it; raises UsageError."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        reason = f"--{setting} {text!r} is no colour."
        raise UsageError(reason, "Use white or #204060, say.", setting) from error


def format_bytes(count: float) -> str:
    """12884901888 -> 12.0 GiB."""
    value, unit = _in_unit(count)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def bytes_at_least(count: float) -> str:
    """As a flag takes it, and no less than `count`: 12884901889 -> 12.1GiB."""
    value, unit = _in_unit(count)
    return f"{math.ceil(value * 10) / 10:.1f}{unit}"


def _in_unit(count: float) -> tuple[float, str]:
    """`count` in the largest unit of which there is at least one."""
    for unit in BYTE_UNITS:
        if abs(count) < 1024 or unit == BYTE_UNITS[-1]:
            return count, unit
        count /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """0.42 -> 0.4 s, 95 -> 1 min 35 s, 7322 -> 2 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def user_path(text: str) -> Path:
    """A path as a person writes it, `~` included; a `~name` of nobody stays as it is."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises for a user who is not there


def is_file(path: Path) -> bool:
    """Whether there is a file that may be looked at; no error for names that cannot be, or folders that are closed."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for both


def is_folder(path: Path) -> bool:
    """As `is_file`, for a folder."""
    return os.path.isdir(path)  # noqa: PTH112
