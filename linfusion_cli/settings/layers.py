"""Merge settings from flags, environment, config file, preset and job into a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from linfusion_cli.core.errors import ConfigError, InputNotFound, UsageError
from linfusion_cli.core.fs import is_file
from linfusion_cli.core.geometry import Size
from linfusion_cli.settings.fields import PARSERS
from linfusion_cli.settings.presets import (
    CONFIG_VARIABLE,
    find_config_file,
    find_preset_file,
    locate_key,
    parse_table,
    read_config_preset,
    read_toml,
)
from linfusion_cli.settings.request import ImageRequest

R = TypeVar("R", bound=ImageRequest)

PREFIX = "LINFUSION_"
JOB = "job"  # the origin of settings that a job of a batch defines itself
HINTS = {  # for settings that have no default
    "prompt": "Write it as the argument, in quotes, or name a --preset that has one.",
    "size": "Add --size 4096, or --size 4096x2048 (width x height).",
    "model": "Add --model, or name a --preset that has one.",
}
# Valid values in place of missing ones, so that an error in another setting is reported first.
PLACEHOLDERS: dict[str, Any] = {
    "prompt": "",
    "size": Size(1024, 1024),
    "model": "auto",
    "output": Path("image.tif"),
    "image": Path("image.png"),
}


@dataclass(frozen=True)
class Layer:
    """Settings from one source: its description for reports, and its path if it is a file."""

    origin: str
    values: Mapping[str, Any]
    path: Path | None = None

    def origin_of(self, setting: str) -> str:
        """Return the description of the source: for an environment variable, its name."""
        return PREFIX + setting.upper() if self.origin == "environment" else self.origin


@dataclass(frozen=True)
class Settings:
    """Merged settings and, for each, the layer it came from."""

    values: Mapping[str, Any]
    layers: Mapping[str, Layer]

    def origins(self, kind: type[ImageRequest]) -> dict[str, str]:
        """Return {setting: origin of its value} for all fields of a request."""
        names = [field.name for field in fields(kind)]
        return {name: self.layers[name].origin_of(name) if name in self.layers else "default" for name in names}


def build_flag_layer(values: Mapping[str, Any]) -> Layer:
    """Return the options given on the command line; None means "not given"."""
    return Layer("flag", {name: value for name, value in values.items() if value is not None})


def read_environment_layer(environ: Mapping[str, str]) -> Layer:
    """Parse the LINFUSION_* variables that are settings; raises UsageError with the variable's name."""
    given = {name: environ[PREFIX + name.upper()] for name in PARSERS if PREFIX + name.upper() in environ}
    values = {}
    for name, text in given.items():
        try:
            values[name] = PARSERS[name](text)
        except ValueError as error:
            raise UsageError(f"{PREFIX}{name.upper()}={text!r} {error}.", "Correct or unset it.") from error
        except UsageError as error:
            raise UsageError(f"{PREFIX}{name.upper()}={text!r} is wrong.", error.hint) from error
    return Layer("environment", values)


def read_config_layer(environ: Mapping[str, str]) -> tuple[Layer, str | None]:
    """Read the user's config file if it exists -> its settings, and the preset that it names."""
    path = find_config_file(environ)
    if not is_file(path):
        if environ.get(CONFIG_VARIABLE):
            raise InputNotFound(f"The config file {path} does not exist.", f"Correct or unset {CONFIG_VARIABLE}.")
        return Layer("config file", {}, path), None
    table = read_toml(path)
    preset = table.pop("preset", None)
    name = None if preset is None else read_config_preset(path, preset)
    return Layer(f"config file {path}", parse_table(path, table), path), name


def read_preset_layer(name: str) -> Layer:
    """Read a preset, given its name or path; raises UsageError, InputNotFound or ConfigError."""
    path = find_preset_file(name)
    return Layer(f"preset {name}", parse_table(path, read_toml(path)), path)


def merge(layers: list[Layer]) -> Settings:
    """Merge `layers`; of several values for one setting, the first layer's counts."""
    values: dict[str, Any] = {}
    origins: dict[str, Layer] = {}
    for layer in reversed(layers):
        values.update(layer.values)
        origins.update(dict.fromkeys(layer.values, layer))
    return Settings(values, origins)


def build_request(settings: Settings, kind: type[R]) -> R:
    """Build the request of this kind; settings that only the other kind has are left out.

    Raises UsageError, or ConfigError if the wrong value is in a file. A wrong value is reported before a missing one.
    """
    names = {field.name for field in fields(kind)}
    given = {name: value for name, value in settings.values.items() if name in names}
    missing = [name for name in list_required_settings(kind) if name not in given]
    try:
        request = kind(**{name: PLACEHOLDERS[name] for name in missing} | given)
    except UsageError as error:
        layer = settings.layers.get(error.setting or "")
        if layer is None or layer.origin in ("flag", JOB):
            raise
        raise _with_origin(error, layer) from error
    if missing:
        raise UsageError(f"No {missing[0]} was given.", HINTS.get(missing[0], ""), missing[0])
    return request


def _with_origin(error: UsageError, layer: Layer) -> UsageError | ConfigError:
    """Return `error` with the variable, or the line of the file, that the wrong value comes from."""
    setting = error.setting or ""
    if layer.path is None:
        return UsageError(f"{layer.origin_of(setting)}: {error.message}", error.hint)
    return ConfigError(f"{locate_key(layer.path, setting)}: {error.message}", error.hint)


def list_required_settings(kind: type[ImageRequest]) -> list[str]:
    """Return the fields of a request that have no default."""
    return [field.name for field in fields(kind) if field.default is MISSING]
