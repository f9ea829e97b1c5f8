"""What a picture says about itself."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

PROMPT_KEY = re.compile(r"(negative_)?prompt(_\d+)?")
NEEDS_QUOTES = re.compile(r"[,:\n]")
# Every request begins with the file's checksum, so that its digits always lie at the same place in the text.
CHECKSUM = "file_sha256"
NO_DIGITS = "0" * 64
DIGITS_AT = len(f'{{"{CHECKSUM}": "')
PROFILE_DATE = bytes.fromhex("07e8 0001 0001 0000 0000 0000")  # 2024-01-01: littlecms writes the present time


@dataclass(frozen=True)
class ImageInfo:
    """Goes into every file: who made it, its resolution in dots per inch, and the request that makes it again.

    `request` holds JSON values; `parameters` is the same in the layout people's tools read (`a1111_parameters`).
    """

    software: str
    dpi: float
    request: Mapping[str, Any]
    prompt: str
    negative_prompt: str
    parameters: str


def a1111_parameters(
    prompt: str,
    negative_prompt: str,
    *,
    steps: int,
    sampler: str,
    cfg_scale: float,
    seed: int,
    size_px: tuple[int, int],
    model: str,
    version: str,
    model_hash: str = "",
    more: Mapping[str, object] | None = None,
) -> str:
    """The text of AUTOMATIC1111's web UI (`create_infotext`): prompt, negative prompt, one line of `Key: value`."""
    settings: dict[str, object] = {
        "Steps": steps,
        "Sampler": sampler,
        "CFG scale": cfg_scale,
        "Seed": seed,
        "Size": f"{size_px[0]}x{size_px[1]}",
        "Model hash": model_hash,
        "Model": model,
        **(more or {}),
        "Version": version,
    }
    line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items() if value != "")
    negative = [f"Negative prompt: {negative_prompt}"] if negative_prompt else []
    return "\n".join([prompt, *negative, line])


def without_prompt(info: ImageInfo) -> ImageInfo:
    """The same without prompts: empty fields, no prompt keys in the request, only the settings line of `parameters`."""
    settings = info.parameters.rpartition("\n")[2]  # values with line breaks are quoted, so this is all of it
    return replace(
        info,
        prompt="",
        negative_prompt="",
        request=remove_prompts(info.request),
        parameters=settings if settings.startswith("Steps: ") else "",
    )


def request_json(info: ImageInfo) -> str:
    """The request as 7-bit ASCII JSON (TIFF's ImageDescription allows nothing else), with 64 zeros for a checksum."""
    return json.dumps({CHECKSUM: NO_DIGITS} | dict(info.request), ensure_ascii=True, allow_nan=False)


def sealed(text: str, digits: str) -> str:
    """The text of `request_json` with these digits instead of the zeros."""
    return text[:DIGITS_AT] + digits + text[DIGITS_AT + len(NO_DIGITS) :]


def utf8(text: str) -> bytes:
    """UTF-8 without NUL, which ends a text in most formats, and without lone surrogates (undecodable arguments)."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", errors="replace")


@cache
def srgb_profile() -> bytes:
    """The ICC profile of sRGB, the same bytes at every call."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + PROFILE_DATE + profile[36:]


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if NEEDS_QUOTES.search(value) else value


def remove_prompts(value: Any) -> Any:
    """A request, or any JSON value, without what prompts it holds."""
    if isinstance(value, Mapping):
        return {key: remove_prompts(item) for key, item in value.items() if not PROMPT_KEY.fullmatch(key)}
    if isinstance(value, list | tuple):
        return [remove_prompts(item) for item in value]
    return value
