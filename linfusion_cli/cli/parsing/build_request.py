"""From the options of a command to a request: prompt, sizes, presets, and where each setting came from."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from linfusion_cli import settings
from linfusion_cli.cli.output import render
from linfusion_cli.core import signals
from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.events import Notice, Observer
from linfusion_cli.core.units import parse_seconds, parse_size
from linfusion_cli.models.locate.model import is_here
from linfusion_cli.settings.request import GenerateRequest, ImageRequest, UpscaleRequest, flag

R = TypeVar("R", bound=ImageRequest)

MAX_TIME_LIMIT_SEC = 1000 * 3600
SIZES = ("size", "base_size", "original_size", "target_size")
PHASED = ("steps", "guidance_scale", "strength", "attention")
WRITTEN = (  # text, for Typer
    *SIZES,
    *PHASED,
    "guidance_interval",
    "cosine",
    "crop_top_left",
    "vram",
    "ram",
    "control_phases",
)

REPEATED = (  # lists, for Typer
    "lora",
    "textual_inversion",
    "ip_adapter",
    "ip_image",
    "ip_scale",
    "controlnet",
    "control_image",
    "control_scale",
    "control_type",
)


def read_request(
    given: dict[str, Any], observer: Observer, kind: type[R] = GenerateRequest
) -> tuple[dict[str, str], R]:
    """The request of this kind that `given` options, environment, config file and preset make together.

    Before it, where each of its settings came from.
    """
    given = read_options(given)
    preset = given.pop("preset")
    given["prompt"] = read_prompt(given["prompt"])
    merged = resolve(given, preset, os.environ, observer, kind)
    return merged.origins(kind), settings.build_request(merged, kind)


def read_options(given: dict[str, Any]) -> dict[str, Any]:
    """What Typer took as text or lists, as a request has it; raises UsageError."""
    given = given | {name: read_text(name, given[name]) for name in WRITTEN if given.get(name) is not None}
    return given | {name: tuple(given[name]) if given[name] else None for name in REPEATED}


def read_text(setting: str, text: str) -> Any:
    """The value that the `text` of an option means; raises UsageError."""
    if setting in SIZES:
        return parse_size(text, setting)
    try:
        return settings.PARSERS[setting](text)
    except ValueError as error:
        raise UsageError(f"{flag(setting)} {text!r} {error}.", "", setting) from error


def keep_to(time_limit: str | None) -> None:
    """Stop when the time that --time-limit says, from now on, is over; raises UsageError."""
    if time_limit is None:
        return
    try:
        seconds = parse_seconds(time_limit)
    except ValueError as error:
        raise UsageError(f"--time-limit {time_limit!r} {error}.") from error
    if not 0 < seconds <= MAX_TIME_LIMIT_SEC:
        raise UsageError(f"--time-limit {time_limit!r} is not possible.", "Use 1s to 1000h.")
    signals.stop_after(seconds)


def quieten_hub(download: bool, quiet: bool) -> None:
    """Tell the hub's library, before it is imported, to keep off the network unless asked, and off a log's lines."""
    if not download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if quiet or not render.on_terminal():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def read_prompt(argument: str | None) -> str | None:
    """The prompt, which `-` takes from standard input; None if there was none."""
    text = read_stdin() if argument == "-" else argument
    if text is not None and not text.strip():
        raise UsageError("The prompt is empty.", "Write what to paint, or leave it out for the preset's sample prompt.")
    return text


def read_stdin() -> str:
    """All of standard input, which is UTF-8 whatever the locale says."""
    try:
        return "" if sys.stdin is None else sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError("The prompt on standard input is not valid UTF-8.", "Convert it, with iconv say.") from error


def resolve(
    given: Mapping[str, Any],
    preset: str | None,
    environ: Mapping[str, str],
    observer: Observer,
    kind: type[ImageRequest],
) -> settings.Settings:
    """All settings of a run, merged."""
    return Sources.read(given, preset, environ, observer).merge(kind)


@dataclass(frozen=True)
class Sources:
    """Where settings come from: flags, environment and config file, and below them the preset that one of these names.

    With no preset and no model named anywhere, that is SDXL's if SDXL is here, else the embedded model's.
    """

    layers: list[settings.Layer]
    preset: str | None
    observer: Observer
    found: dict[str, settings.Layer] = field(default_factory=dict)  # presets that were read

    @staticmethod
    def read(given: Mapping[str, Any], preset: str | None, environ: Mapping[str, str], observer: Observer) -> Sources:
        """Read all of them; raises UsageError, InputMissing or ConfigError."""
        config, config_preset = settings.config_layer(environ)
        layers = [settings.flag_layer(given), settings.environment_layer(environ), config]
        named = (preset, environ.get("LINFUSION_PRESET"), config_preset)
        name = next((name for name in named if name is not None), None)
        return Sources(layers, name, observer, {} if name is None else {name: settings.preset_layer(name)})

    def merge(
        self, kind: type[ImageRequest], job: settings.Layer | None = None, preset: str | None = None
    ) -> settings.Settings:
        """All settings, merged: above all others those of a `job`, whose `preset` is another one."""
        layers = [job, *self.layers] if job else list(self.layers)
        name = self.preset if preset is None else preset
        if name is None and not any("model" in layer.values for layer in layers):
            name = self._default
        if name is not None:
            layer = self._preset_layer(name)
            layers.append(without_prompt(layer) if kind is UpscaleRequest or job else layer)
        return settings.merge([*layers, output_layer(layers)])

    @cached_property
    def _default(self) -> str:
        if is_here(settings.preset_layer(settings.SDXL).values["model"]):
            return settings.SDXL
        self.observer(
            Notice("SDXL with LinFusion's weights is not on this machine: the small embedded demo model paints.")
        )
        return settings.DEMO

    def _preset_layer(self, name: str) -> settings.Layer:
        if name not in self.found:
            self.found[name] = settings.preset_layer(name)
        return self.found[name]


def without_prompt(preset: settings.Layer) -> settings.Layer:
    """A preset without its sample prompt: of a picture that there is it says nothing, and no job means it."""
    return replace(preset, values={name: value for name, value in preset.values.items() if name != "prompt"})


def output_layer(layers: list[settings.Layer]) -> settings.Layer:
    """The output's name where none is given: it tells size and seed, or the picture it grew from, and stands here."""
    values = settings.merge(layers).values
    suffix = {"png": ".png", "jpeg": ".jpg"}.get(values.get("format"), ".tif")
    size, image = values.get("size"), values.get("image")
    name = f"linfusion-{size}-seed{values.get('seed', 0)}"
    if image is not None and size is not None:
        name = f"{image.stem}-{max(size.pair)}"
    return settings.Layer("default", {"output": Path(name + suffix)})
