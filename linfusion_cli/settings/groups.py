"""Settings with several parts: LoRAs, textual inversions, ControlNets, IP-Adapters, and the image to upscale.

Files write ControlNets and IP-Adapters as tables, `[[controlnet]] model= image= scale= type=`, or as flat lists like
the flags, which are matched by position.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from linfusion_cli.core.fs import expand_home, is_file
from linfusion_cli.core.units import parse_colour
from linfusion_cli.settings.kinds import NUMBER, TEXT, Kind
from linfusion_cli.settings.setting import setting

MAX_LORA_WEIGHT = 10.0
SAFETENSORS_SUFFIX = ".safetensors"
T = TypeVar("T")


@dataclass(frozen=True)
class Lora:
    """A LoRA: a file, folder or hub id, and its weight."""

    model: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.model if self.weight == 1 else f"{self.model}:{self.weight:g}"


@dataclass(frozen=True)
class TextualInversion:
    """A textual inversion: a file, folder or hub id, and the token that the prompt uses for it.

    Without a token, the one in the file is used.
    """

    model: str
    token: str | None = None

    def __str__(self) -> str:
        return self.model if self.token is None else f"{self.model}:{self.token}"


def parse_lora(value: Any) -> Lora:
    """Parse "FILE", "FILE:WEIGHT" or {"model": FILE, "weight": WEIGHT}; raises ValueError."""
    if isinstance(value, Lora):
        return value
    if isinstance(value, Mapping):
        model, weight = _read_parts(value, {"model": TEXT.parse, "weight": NUMBER.parse}, "weight", 1.0)
    else:
        model, weight = split_weight(TEXT.parse(value).strip())
    if not model.strip():
        raise ValueError("has no file name: use FILE or FILE:WEIGHT, e.g. FILE:0.8")
    if not math.isfinite(weight) or abs(weight) > MAX_LORA_WEIGHT:
        raise ValueError(f"has the weight {weight:g}: use {-MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}, e.g. FILE:0.8")
    return Lora(model, weight)


def split_weight(text: str) -> tuple[str, float]:
    """Split "FILE:0.8" into the LoRA and its weight, by default 1."""
    name, colon, number = text.rpartition(":")
    try:
        return (name, float(number)) if colon else (text, 1.0)
    except ValueError:  # the colon belongs to the path
        return text, 1.0


def parse_inversion(value: Any) -> TextualInversion:
    """Parse "FILE", "FILE:TOKEN" or {"model": FILE, "token": TOKEN}; raises ValueError."""
    if isinstance(value, TextualInversion):
        return value
    if isinstance(value, Mapping):
        model, token = _read_parts(value, {"model": TEXT.parse, "token": _parse_optional_text}, "token", None)
    else:
        model, token = split_token(TEXT.parse(value).strip())
    if not model.strip() or (token is not None and not token.strip()):
        raise ValueError("has no file name or an empty token: use FILE or FILE:TOKEN")
    return TextualInversion(model, token and token.strip())


def split_token(text: str) -> tuple[str, str | None]:
    """Split "FILE:TOKEN" into the textual inversion and its token, None if none is given.

    The colon belongs to the path if `text` is an existing file, or if the text after the colon looks like a path.
    """
    name, colon, token = text.rpartition(":")
    if not colon or is_file(expand_home(text)) or token.endswith(SAFETENSORS_SUFFIX) or set(token) & {"/", "\\"}:
        return text, None
    return name, token


def _parse_optional_text(value: Any) -> str | None:
    return None if value is None else TEXT.parse(value)


def _read_parts(value: Mapping[str, Any], parsers: Mapping[str, Callable[[Any], Any]], optional: str, default: Any):
    """Return the model and the optional part of a table; raises ValueError for other keys."""
    if not {"model"} <= value.keys() <= parsers.keys():
        raise ValueError(f"must have the keys model and, optionally, {optional}")
    return parsers["model"](value["model"]), parsers[optional](value.get(optional, default))


def _build_kind(parse: Callable[[Any], Any], part: str, part_schema: Mapping[str, Any], metavar: str) -> Kind:
    """Return the kind of a value that is text or a table of a model and another part."""
    properties = {"model": {"type": "string"}, part: dict(part_schema)}
    table = {"type": "object", "properties": properties, "required": ["model"], "additionalProperties": False}
    return Kind(parse, {"anyOf": [{"type": "string"}, table]}, metavar)


LORA = _build_kind(parse_lora, "weight", {"type": "number"}, "FILE[:WEIGHT]")
INVERSION = _build_kind(parse_inversion, "token", {"type": ["string", "null"]}, "FILE[:TOKEN]")


@dataclass(frozen=True, kw_only=True)
class IpAdapter:
    """An IP-Adapter, its image prompt, and its weight."""

    model: str = setting(
        name="ip_adapter",
        help="An IP-Adapter: a file, a folder, or a hub id (OWNER/REPO or OWNER/REPO/FILE). Can be repeated.",
        panel="Input images",
        metavar="ADAPTER",
        names_file=True,
        reloads=("unet",),
        used_by_decode=False,
        completion="files",
    )
    image: str = setting(
        name="ip_image",
        help="The image prompt of an --ip-adapter: one for each, in the same order.",
        panel="Input images",
        metavar="FILE",
        names_file=True,
        used_by_decode=False,
        completion="files",
    )
    scale: float = setting(
        1.0,
        name="ip_scale",
        help="Weight of an --ip-adapter: one for each; the last one holds for the rest.",
        panel="Input images",
        metavar="SCALE",
        limits=(-10, 10),
        reloads=("unet",),
        used_by_decode=False,
        aliases=("ip_adapter_scale",),
    )


@dataclass(frozen=True, kw_only=True)
class ControlNet:
    """A ControlNet, its control image, its weight, and, for a union model, the type of the image."""

    model: str = setting(
        name="controlnet",
        help="A ControlNet or union ControlNet: a folder in the diffusers layout, or a hub id. Can be repeated.",
        panel="Input images",
        metavar="MODEL",
        names_file=True,
        reloads=("unet",),
        used_by_decode=False,
        completion="files",
    )
    image: str = setting(
        name="control_image",
        help="The control image (edges, depth, pose …) of a --controlnet: one for each.",
        panel="Input images",
        metavar="FILE",
        names_file=True,
        used_by_decode=False,
        completion="files",
    )
    scale: float = setting(
        1.0,
        name="control_scale",
        help="Weight of a --controlnet, from 0: one for each; the last one holds for the rest.",
        panel="Input images",
        metavar="SCALE",
        limits=(0, 10),
        used_by_decode=False,
        aliases=("controlnet_conditioning_scale", "control_weight"),
    )
    type: str | None = setting(
        None,
        name="control_type",
        help="The type of the control image of a union ControlNet: canny, depth, openpose, tile …, or its index; one "
        "for each union ControlNet.",
        panel="Input images",
        metavar="TYPE",
        used_by_decode=False,
        aliases=("control_mode",),
    )


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """The image to upscale, and the colour for its transparent parts."""

    image: Path = setting(
        help="The image to upscale: PNG, JPEG, WebP or TIFF.",
        panel="Input images",
        metavar="FILE",
        decides="nothing",  # the hash of the content is compared
        commands=("upscale", "plan"),
        argument_of=("upscale",),
        sources=("flag", "job"),
        aliases=("init_image", "input_image"),
        completion="files",
    )
    background: str | None = setting(
        None,
        help="Colour for transparent parts of the input image, e.g. white or #204060. Required for such images.",
        panel="Input images",
        metavar="COLOUR",
        default_text="",
        commands=("upscale", "plan", "batch"),
    )

    def background_rgb(self) -> tuple[int, int, int] | None:
        """Return red, green and blue, 0 to 255, of the background, or None; raises UsageError for an unknown colour."""
        return None if self.background is None else parse_colour(self.background)


def match_by_position(item: type[T], names: Mapping[str, str], values: Mapping[str, Any]) -> tuple[T, ...]:
    """Return the groups for flat lists: the i-th value of each list belongs to the i-th group.

    names: the fields of `item` and the names of the lists. The last value holds for all later groups. A field whose
    list has no value keeps its default; optional text is matched to the first groups.
    """
    lists = {field: tuple(values.get(name) or ()) for field, name in names.items()}
    defaults = {field.name: field.default for field in dataclasses.fields(item)}  # type: ignore[arg-type]
    groups = []
    for i in range(len(lists["model"])):
        parts = {field: pick_value(given, i, defaults[field] is not None) for field, given in lists.items()}
        groups.append(item(**{field: value for field, value in parts.items() if value is not None}))
    return tuple(groups)


def pick_value(values: tuple, index: int, last_holds: bool) -> Any:
    """Return the value at `index`; beyond the end the last value, or None if it does not hold for the rest."""
    if index < len(values):
        return values[index]
    return values[-1] if values and last_holds else None
