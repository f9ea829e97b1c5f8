"""How each setting is read from text or from a TOML value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from linfusion_cli.geometry import Size
from linfusion_cli.units import parse_bytes, parse_size

TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d+", str(value).strip(), re.ASCII):
        raise ValueError("must be a whole number")
    return int(value)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError("must be a number") from None


def _truth(value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in TRUE + FALSE:
        raise ValueError("must be true or false")
    return text in TRUE


def _bytes(value: Any) -> int:
    return parse_bytes(str(value))


def _size(value: Any) -> Size:
    return parse_size(str(value))


PARSERS: dict[str, Callable[[Any], Any]] = {
    "model": _text,
    "linfusion": _text,
    "vae": _text,
    "prompt": _text,
    "negative_prompt": _text,
    "size": _size,
    "seed": _whole,
    "steps": _whole,
    "guidance_scale": _number,
    "guidance_rescale": _number,
    "strength": _number,
    "attention": _text,
    "vae_statistics": _text,
    "vae_latents": _text,
    "vram": _bytes,
    "ram": _bytes,
    "dtype": _text,
    "device": _text,
    "format": _text,
    "compression": _text,
    "bits": _whole,
    "dither": _truth,
    "dpi": _number,
    "prompt_metadata": _truth,
}
