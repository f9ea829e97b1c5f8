"""Settings from everywhere, merged into a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from linfusion_cli.core.errors import ConfigError, InputNotFound, UsageError
from linfusion_cli.core.units import is_file
from linfusion_cli.settings.fields import PARSERS
from linfusion_cli.settings.presets import (
    CONFIG_VARIABLE,
    config_path,
    parse_table,
    place,
    preset_names,
    preset_path,
    read_toml,
)
from linfusion_cli.settings.request import ImageRequest

R = TypeVar("R", bound=ImageRequest)

PREFIX = "LINFUSION_"
JOB = "job"  # the origin of what a job of a batch says itself
WAYS_TO_GIVE = {
    "prompt": "Write it as the argument, in quotes, or name a --preset that has one.",
    "size": "Add --size 4096, or --size 4096x2048 (width x height).",
}


@dataclass(frozen=True)
class Layer:
    """Settings from one source; `origin` says it to a person, `path` is the file where it is one."""

    origin: str
    values: Mapping[str, Any]
    path: Path | None = None

    def origin_of(self, setting: str) -> str:
        return PREFIX + setting.upper() if self.origin == "environment" else self.origin


@dataclass(frozen=True)
class Settings:
    """The merged settings and, for each, the layer it came from."""

    values: Mapping[str, Any]
    layers: Mapping[str, Layer]

    def origins(self, kind: type[ImageRequest]) -> dict[str, str]:
        """Setting -> where its value came from, for all fields of a request."""
        names = [field.name for field in fields(kind)]
        return {name: self.layers[name].origin_of(name) if name in self.layers else "default" for name in names}


def flag_layer(values: Mapping[str, Any]) -> Layer:
    """What was given on the command line; None means "not given"."""
    return Layer("flag", {name: value for name, value in values.items() if value is not None})


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """The LINFUSION_* variables that are settings; raises UsageError naming the variable."""
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


def config_layer(environ: Mapping[str, str]) -> tuple[Layer, str | None]:
    """The user's config file, if there is one, and the preset that it names."""
    path = config_path(environ)
    if not is_file(path):
        if environ.get(CONFIG_VARIABLE):
            raise InputNotFound(f"The config file {path} is missing.", f"Correct or unset {CONFIG_VARIABLE}.")
        return Layer("config file", {}, path), None
    table = read_toml(path)
    preset = table.pop("preset", None)
    if preset is not None and preset not in preset_names() and not str(preset).endswith(".toml"):
        hint = f"Use one of {', '.join(preset_names())}, or the path of a .toml file."
        raise ConfigError(f"{place(path, 'preset')}: there is no preset {preset!r}.", hint)
    return Layer(f"config file {path}", parse_table(path, table), path), preset


def preset_layer(name: str) -> Layer:
    """The preset `name`, or the file it names if it ends in .toml; raises UsageError, InputMissing or ConfigError."""
    path = preset_path(name)
    return Layer(f"preset {name}", parse_table(path, read_toml(path)), path)


def merge(layers: list[Layer]) -> Settings:
    """The settings of all `layers`, the first that has one winning."""
    values: dict[str, Any] = {}
    origins: dict[str, Layer] = {}
    for layer in reversed(layers):
        values.update(layer.values)
        origins.update(dict.fromkeys(layer.values, layer))
    return Settings(values, origins)


def build_request(settings: Settings, kind: type[R]) -> R:
    """The request of this kind that the settings make; those of the other kind alone are left out.

    Raises UsageError, or ConfigError where a wrong value stands in a file.
    """
    names = {field.name for field in fields(kind)}
    missing = [name for name in required(kind) if name not in settings.values]
    if missing:
        raise UsageError(f"No {missing[0]} was given.", WAYS_TO_GIVE.get(missing[0], ""), missing[0])
    try:
        return kind(**{name: value for name, value in settings.values.items() if name in names})
    except UsageError as error:
        layer = settings.layers.get(error.setting or "")
        if layer is None or layer.origin in ("flag", JOB):
            raise
        if layer.path is None:
            raise UsageError(f"{layer.origin_of(error.setting)}: {error.message}", error.hint) from error
        raise ConfigError(f"{place(layer.path, error.setting)}: {error.message}", error.hint) from error


def required(kind: type[ImageRequest]) -> list[str]:
    """The fields of a request that have no default."""
    return [field.name for field in fields(kind) if field.default is MISSING]
