"""Build requests from command-line options, environment, config file and presets, with the origin of each setting."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from linfusion_cli import settings
from linfusion_cli.cli.output.streams import is_terminal
from linfusion_cli.core import signals
from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.events import Notice, Observer
from linfusion_cli.core.units import parse_seconds
from linfusion_cli.models.locate.model import is_local
from linfusion_cli.settings.command_options import CommandOptions
from linfusion_cli.settings.request import Request

MAX_TIME_LIMIT_SEC = 1000 * 3600
PRESET_VARIABLE = "LINFUSION_PRESET"
SUFFIXES = {"png": ".png", "jpeg": ".jpg"}


def read_request(given: Mapping[str, Any], observer: Observer) -> tuple[dict[str, str], Request]:
    """Build the request from the `given` options, environment, config file and preset.

    Returns the origin of each setting, and the request.
    """
    given = {**given, "prompt": read_prompt(given.get("prompt"))}
    notices: list[Any] = []  # about the model: not before an error
    merged = replace(Sources.read(given, os.environ, observer), observer=notices.append).merge()
    request = settings.build_request(merged)
    for notice in notices:
        observer(notice)
    return merged.origins(), request


def read_command_options(given: Mapping[str, Any]) -> CommandOptions:
    """Return the options of a command that are not part of a request; raises UsageError."""
    own = {name: value for name, value in given.items() if name in CommandOptions.__dataclass_fields__}
    return CommandOptions(**settings.raise_errors(settings.read_flag_layer(own)).values)


def start_time_limit(time_limit: str | None) -> None:
    """Stop the run after the time of --time-limit, counted from now; raises UsageError."""
    if time_limit is None:
        return
    try:
        seconds = parse_seconds(time_limit)
    except ValueError as error:
        raise UsageError(f"--time-limit {time_limit!r} {error}.") from error
    if not 0 < seconds <= MAX_TIME_LIMIT_SEC:
        raise UsageError(f"--time-limit {time_limit!r} is out of range.", "Use 1s to 1000h.")
    signals.start_time_limit(seconds)


def configure_hub(download: bool, quiet: bool) -> None:
    """Set huggingface_hub to offline mode unless `download`, and without progress bars in logs.

    Must be called before huggingface_hub is imported.
    """
    if not download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if quiet or not is_terminal():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def read_prompt(argument: str | None) -> str | None:
    """Return the prompt, read from standard input if the argument is "-"; None if no prompt is given."""
    text = read_stdin() if argument == "-" else argument
    if text is not None and not text.strip():
        raise UsageError(
            "The prompt is empty.", "Describe the image, or omit the prompt to use the preset's sample prompt."
        )
    return text


def read_stdin() -> str:
    """Return all of standard input, decoded as UTF-8 independent of the locale."""
    try:
        return "" if sys.stdin is None else sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError("The prompt on standard input is not valid UTF-8.", "Convert it, e.g. with iconv.") from error


@dataclass(frozen=True)
class Sources:
    """The sources of settings, in descending precedence: flags, environment, config file, preset.

    `preset` is the first one that any of these names. Without a preset and a model, the preset is sdxl if that model is
    installed, else demo.
    """

    layers: Sequence[settings.Layer]
    preset: str | None
    observer: Observer
    preset_layers: dict[str, settings.Layer] = field(default_factory=dict)  # cache of presets by name

    @staticmethod
    def read(given: Mapping[str, Any], environ: Mapping[str, str], observer: Observer) -> Sources:
        """Read all sources; raises UsageError, InputNotFound or ConfigError for files that cannot be read."""
        config, config_preset = settings.read_config_layer(environ)
        layers = [settings.read_flag_layer(given), settings.read_environment_layer(environ), config]
        for layer in layers:
            for notice in layer.notices:
                observer(Notice(notice))
        named = (given.get("preset"), environ.get(PRESET_VARIABLE), config_preset)
        name = next((name for name in named if name is not None), None)
        return Sources(layers, name, observer, {} if name is None else {name: settings.read_preset_layer(name)})

    def merge(self, job: settings.Layer | None = None) -> settings.Settings:
        """Merge all settings. Those of a `job` have the highest precedence; its `preset` replaces the common one."""
        layers = [job, *self.layers] if job else list(self.layers)
        name = (job.values.get("preset") if job else None) or self.preset
        if name is None and not any("model" in layer.values for layer in layers):
            name = self._default_preset
        is_upscale = any(layer.values.get("image") is not None for layer in layers)
        if name is not None:
            preset = self._preset_layer(name)
            layers.append(drop_inapplicable_settings(preset, is_upscale, is_job=job is not None))
        layers.append(build_size_layer(layers))
        return settings.merge([*layers, build_output_layer(layers)])

    @cached_property
    def _default_preset(self) -> str:
        """Return sdxl if its model is installed, else demo, with a notice."""
        model = settings.read_preset_layer(settings.SDXL).values.get("model")
        if model is not None and is_local(model):
            return settings.SDXL
        self.observer(
            Notice(
                "SDXL with LinFusion's weights is not installed: using the small embedded demo model. "
                "Run `linfusion models pull sdxl`, or use --preset."
            )
        )
        return settings.DEMO

    def _preset_layer(self, name: str) -> settings.Layer:
        if name not in self.preset_layers:
            self.preset_layers[name] = settings.read_preset_layer(name)
        return self.preset_layers[name]


def drop_inapplicable_settings(preset: settings.Layer, is_upscale: bool, is_job: bool) -> settings.Layer:
    """Return a preset without its sample prompt for a job or an upscale, and without its size for an upscale.

    The prompt of an upscale describes the source image, and its size depends on that image.
    """
    dropped = ("prompt", "size") if is_upscale else ("prompt",) if is_job else ()
    return replace(preset, values={name: value for name, value in preset.values.items() if name not in dropped})


def build_size_layer(layers: Sequence[settings.Layer]) -> settings.Layer:
    """Return the default size of an upscale: twice that of the image; raises the errors of reading it."""
    values = settings.merge(layers).values
    has_problem = any(getattr(error, "setting", None) == "size" for layer in layers for error in layer.errors)
    if values.get("image") is None or "size" in values or has_problem:
        return settings.Layer("default", {})
    from linfusion_cli.run.inputs.source_image import double_image_size  # numpy and more: not needed for --help

    return settings.Layer("default", {"size": double_image_size(values["image"])})


def build_output_layer(layers: Sequence[settings.Layer]) -> settings.Layer:
    """Return the default output: in the current folder, named after size and seed, or after the upscaled image."""
    values = settings.merge(layers).values
    suffix = SUFFIXES.get(values.get("format") or "", ".tif")
    size, image = values.get("size"), values.get("image")
    name = f"linfusion-{size}-seed{values.get('seed', 0)}"
    if image is not None and size is not None:
        name = f"{image.stem}-{max(size.pair)}"
    return settings.Layer("default", {"output": Path(name + suffix)})


def build_job_request(sources: Sources, values: Mapping[str, Any]) -> tuple[dict[str, str], Request]:
    """Build the request of a job from its own values and `sources` -> origins of its settings, request."""
    merged = sources.merge(settings.Layer(settings.JOB, values))
    if "image" not in merged.values and "prompt" not in merged.values:
        raise UsageError("Empty job: a prompt is required.", "Add a prompt, or an image to upscale.")
    return merged.origins(), settings.build_request(merged)
