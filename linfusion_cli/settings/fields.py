"""Parse each setting from text or from a TOML value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from linfusion_cli.core.geometry import Size
from linfusion_cli.core.units import parse_bytes, parse_size

TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d+", str(value).strip(), re.ASCII):
        raise ValueError("must be a whole number")
    return int(value)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError("must be a number") from None


def _boolean(value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in TRUE + FALSE:
        raise ValueError("must be true or false")
    return text in TRUE


def _bytes(value: Any) -> int:
    return parse_bytes(str(value))


def _size(value: Any) -> Size:
    return parse_size(str(value))


def _phase(value: Any) -> str:
    """Parse `base`, `all`, or the index of a phase, which is an integer in TOML."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _list_of(one: Callable[[Any], Any]) -> Callable[[Any], tuple]:
    """Return a parser of one value, a list of values, or text with values separated by commas."""

    def read(value: Any) -> tuple:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return tuple(one(part.strip() if isinstance(part, str) else part) for part in parts)

    return read


def _strings(value: Any) -> tuple[str, ...]:
    """Parse one string or a list of strings: a comma is part of a file's name."""
    return tuple(_text(part).strip() for part in (value if isinstance(value, list | tuple) else [value]))


PARSERS: dict[str, Callable[[Any], Any]] = {
    "model": _text,
    "linfusion": _text,
    "linfusion_merge": _text,
    "linfusion_base": _text,
    "vae": _text,
    "lora": _strings,
    "textual_inversion": _strings,
    "clip_skip": _integer,
    "ip_adapter": _strings,
    "ip_image": _strings,
    "ip_scale": _list_of(_number),
    "ip_image_encoder": _text,
    "controlnet": _strings,
    "control_image": _strings,
    "control_scale": _list_of(_number),
    "control_type": _list_of(_text),
    "control_phases": _list_of(_phase),
    "prompt": _text,
    "negative_prompt": _text,
    "strict_prompt": _boolean,
    "size": _size,
    "seed": _integer,
    "prediction_type": _text,
    "scheduler": _text,
    "timestep_spacing": _text,
    "steps": _list_of(_integer),
    "guidance_scale": _list_of(_number),
    "guidance_rescale": _number,
    "guidance_interval": _list_of(_number),
    "upscaler": _text,
    "upscale_space": _text,
    "base_size": _size,
    "strength": _list_of(_number),
    "cosine": _list_of(_number),
    "blur_sigma": _number,
    "dilated_min": _number,
    "original_size": _size,
    "target_size": _size,
    "crop_top_left": _list_of(_integer),
    "background": _text,
    "attention": _list_of(_text),
    "vae_statistics": _text,
    "vae_latents": _text,
    "vram": _bytes,
    "ram": _bytes,
    "dtype": _text,
    "device": _text,
    "format": _text,
    "compression": _text,
    "bits": _integer,
    "dither": _boolean,
    "dpi": _number,
    "save_phases": _boolean,
    "prompt_metadata": _boolean,
    "checkpoint_every": _number,
}
