"""Parse and format sizes ("16384x8192"), bytes ("12.0 GiB"), durations and colours."""

import math
import re

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size

MIN_PX = 64
BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_size(text: str, min_px: int = MIN_PX) -> Size:
    """Parse "2048" (a square) or "2048x1024" (width x height) in pixels, at least `min_px`; raises ValueError."""
    match = re.fullmatch(r"\s*(\d{1,7})\s*(?:[xX×]\s*(\d{1,7})\s*)?", text, re.ASCII)
    if match is None:
        raise ValueError("is not a size: use 16384 for a square, or 16384x8192 (width x height)")
    width, height = int(match[1]), int(match[2] or match[1])
    if min(width, height) < min_px:
        raise ValueError(f"is too small: both sides must be at least {min_px} pixels")
    return Size(width, height)


def parse_bytes(text: str) -> int:
    """Parse "12GiB", "12.5 GB", "800M" or "4096B"; raises ValueError, also for a number without a unit.

    KiB, MiB, GiB and TiB are powers of 1024, KB, MB, GB and TB powers of 1000; a single letter is a power of 1024.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*(?:([kmgt])?(i?b)?)?\s*", text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise ValueError("is not an amount of memory: use e.g. 12GiB")
    number, letter, ending = match.groups()
    if not letter and not ending and float(number):
        raise ValueError(f"has no unit: {_suggest_bytes(number)}")
    base = 1000 if letter and (ending or "").lower() == "b" else 1024
    return round(float(number) * base ** ("bkmgt".index(letter.lower()) if letter else 0))


def _suggest_bytes(number: str) -> str:
    """Return the two likely meanings of an amount of memory without a unit: 12 is hardly 12 bytes."""
    if float(number) < 1024:
        return f"use {number}GiB or {number}MiB"
    if float(number) < 1 << 20:
        return f"use {number}MiB or {number}B"
    return f"use {number}B, or about {format_bytes_rounded_up(float(number))}"


def parse_seconds(text: str) -> float:
    """Parse "90s", "50m", "1.5h" or "1h30m" into seconds; raises ValueError, also for a number without a unit."""
    number = r"(\d{1,9}(?:\.\d{1,6})?)"
    match = re.fullmatch(rf"\s*(?:{number}h)?(?:{number}m)?(?:{number}s)?\s*", text, re.ASCII | re.IGNORECASE)
    if match is not None and any(match.groups()):
        return sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))
    if re.fullmatch(rf"\s*{number}\s*", text, re.ASCII):
        raise ValueError(f"has no unit: use {text.strip()}m for minutes or {text.strip()}s for seconds")
    raise ValueError("is not a duration: use e.g. 50m, 1h30m or 90s")


def parse_colour(text: str, setting: str = "background") -> tuple[int, int, int]:
    """Parse a CSS colour into red, green and blue (0 to 255); raises UsageError."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        reason = f"--{setting} {text!r} is not a colour."
        raise UsageError(reason, "Use a CSS colour such as white or #204060.", setting) from error


def format_bytes(count: float) -> str:
    """Format a number of bytes: 12884901888 -> 12.0 GiB."""
    value, unit = _choose_unit(count)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def format_bytes_rounded_up(count: float) -> str:
    """Format a number of bytes for a flag, rounded up: 12884901889 -> 12.1GiB."""
    value, unit = _choose_unit(count)
    return f"{math.ceil(value * 10) / 10:.1f}{unit}"


def _choose_unit(count: float) -> tuple[float, str]:
    """Return the value and the unit: the largest unit in which the value is at least 1."""
    for unit in BYTE_UNITS:
        if abs(count) < 1024 or unit == BYTE_UNITS[-1]:
            return count, unit
        count /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """Format a duration: 0.42 -> 0.4 s, 95 -> 1 min 35 s, 7322 -> 2 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
