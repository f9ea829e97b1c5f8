"""How each setting is read from text or from a TOML value."""

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


def _phase(value: Any) -> str:
    """`base`, `all`, or the number of a phase, which TOML has as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _several(one: Callable[[Any], Any]) -> Callable[[Any], tuple]:
    """Reads one value, a list of them, or text with commas between."""

    def read(value: Any) -> tuple:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return tuple(one(part.strip() if isinstance(part, str) else part) for part in parts)

    return read


def _repeated(value: Any) -> tuple[str, ...]:
    """Reads one text or a list of them: a comma is part of a file's name."""
    return tuple(_text(part).strip() for part in (value if isinstance(value, list | tuple) else [value]))


PARSERS: dict[str, Callable[[Any], Any]] = {
    "model": _text,
    "linfusion": _text,
    "linfusion_merge": _text,
    "linfusion_base": _text,
    "vae": _text,
    "lora": _repeated,
    "textual_inversion": _repeated,
    "clip_skip": _whole,
    "ip_adapter": _repeated,
    "ip_image": _repeated,
    "ip_scale": _several(_number),
    "ip_image_encoder": _text,
    "controlnet": _repeated,
    "control_image": _repeated,
    "control_scale": _several(_number),
    "control_type": _several(_text),
    "control_phases": _several(_phase),
    "prompt": _text,
    "negative_prompt": _text,
    "strict_prompt": _truth,
    "size": _size,
    "seed": _whole,
    "prediction_type": _text,
    "scheduler": _text,
    "timestep_spacing": _text,
    "steps": _several(_whole),
    "guidance_scale": _several(_number),
    "guidance_rescale": _number,
    "guidance_interval": _several(_number),
    "upscaler": _text,
    "upscale_space": _text,
    "base_size": _size,
    "strength": _several(_number),
    "cosine": _several(_number),
    "blur_sigma": _number,
    "dilated_min": _number,
    "original_size": _size,
    "target_size": _size,
    "crop_top_left": _several(_whole),
    "background": _text,
    "attention": _several(_text),
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
    "save_phases": _truth,
    "prompt_metadata": _truth,
    "checkpoint_every": _number,
}
