"""The metadata of an output file, and its serialisation as JSON and as A1111 parameters."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

PROMPT_KEY = re.compile(r"(negative_)?prompt(_\d+)?")
NEEDS_QUOTES = re.compile(r"[,:\n]")
# The checksum is the first key of every request, which gives its digits a fixed offset in the text.
CHECKSUM_KEY = "file_sha256"
EMPTY_CHECKSUM = "0" * 64
CHECKSUM_OFFSET = len(f'{{"{CHECKSUM_KEY}": "')
PROFILE_DATE = bytes.fromhex("07e8 0001 0001 0000 0000 0000")  # 2024-01-01; littlecms writes the current time


@dataclass(frozen=True)
class ImageInfo:
    """The metadata of an output file: the software, the resolution in dots per inch, and the request.

    `request` is a JSON object; it is enough to generate the image again. `parameters` is the same information in the
    text format of A1111 (see `format_a1111_parameters`).
    """

    software: str
    dpi: float
    request: Mapping[str, Any]
    prompt: str
    negative_prompt: str
    parameters: str


def format_a1111_parameters(
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
    extra: Mapping[str, object] | None = None,
) -> str:
    """Return the text of AUTOMATIC1111's `create_infotext`: prompt, negative prompt, and a line of `Key: value`."""
    settings: dict[str, object] = {
        "Steps": steps,
        "Sampler": sampler,
        "CFG scale": cfg_scale,
        "Seed": seed,
        "Size": f"{size_px[0]}x{size_px[1]}",
        "Model hash": model_hash,
        "Model": model,
        **(extra or {}),
        "Version": version,
    }
    line = ", ".join(f"{key}: {_quote_value(str(value))}" for key, value in settings.items() if value != "")
    negative = [f"Negative prompt: {negative_prompt}"] if negative_prompt else []
    return "\n".join([prompt, *negative, line])


def remove_prompt_metadata(info: ImageInfo) -> ImageInfo:
    """Return `info` with empty prompts, a request without prompt keys, and only the settings line of `parameters`."""
    settings = info.parameters.rpartition("\n")[2]  # complete, because values with line breaks are quoted
    return replace(
        info,
        prompt="",
        negative_prompt="",
        request=remove_prompt_keys(info.request),
        parameters=settings if settings.startswith("Steps: ") else "",
    )


def serialize_request(info: ImageInfo) -> str:
    """Return the request as JSON in 7-bit ASCII, as TIFF's ImageDescription requires, with 64 zeros as checksum."""
    return json.dumps({CHECKSUM_KEY: EMPTY_CHECKSUM} | dict(info.request), ensure_ascii=True, allow_nan=False)


def insert_checksum(text: str, digits: str) -> str:
    """Replace the zeros in the result of `serialize_request` by the checksum's digits."""
    return text[:CHECKSUM_OFFSET] + digits + text[CHECKSUM_OFFSET + len(EMPTY_CHECKSUM) :]


def encode_utf8(text: str) -> bytes:
    """Encode as UTF-8; replace NUL, which ends a text in most formats, and lone surrogates (undecodable arguments)."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", errors="replace")


@cache
def build_srgb_profile() -> bytes:
    """Return the ICC profile of sRGB, the same bytes in every process."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + PROFILE_DATE + profile[36:]


def _quote_value(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if NEEDS_QUOTES.search(value) else value


def remove_prompt_keys(value: Any) -> Any:
    """Return a request, or any JSON value, without its prompt keys at any depth."""
    if isinstance(value, Mapping):
        return {key: remove_prompt_keys(item) for key, item in value.items() if not PROMPT_KEY.fullmatch(key)}
    if isinstance(value, list | tuple):
        return [remove_prompt_keys(item) for item in value]
    return value
