"""Merge settings from flags, environment, config file, preset and job into a request."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linfusion_cli.core.errors import ConfigError, InputNotFound, LinfusionError, UsageError
from linfusion_cli.core.fs import is_file
from linfusion_cli.core.geometry import Size
from linfusion_cli.settings.checks import flag, list_errors, raise_all
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.setting import PREFIX, Source
from linfusion_cli.settings.sources.presets import (
    CONFIG_VARIABLE,
    OTHER_VARIABLES,
    find_config_file,
    find_preset_file,
    locate_key,
    read_config_preset,
    read_toml,
)
from linfusion_cli.settings.sources.values import Problem, parse_values
from linfusion_cli.settings.table import ALL_SETTINGS, MEMBERS, SETTINGS, assemble_request, select_settings

FLAG, ENVIRONMENT, JOB = "flag", "environment", "job"  # origins
PRESET = "preset"
HINTS = {  # for settings that have no default
    "prompt": "Write it as the argument, in quotes, or name a --preset that has one.",
    "size": "Add --size 4096, or --size 4096x2048 (width x height).",
    "model": "Add --model, or name a --preset that has one.",
}
# Valid values in place of missing ones, so that errors in other settings are reported first.
PLACEHOLDERS: dict[str, Any] = {
    "prompt": "",
    "size": Size(1024, 1024),
    "output": Path("image.tif"),
    "model": "auto",
}


@dataclass(frozen=True)
class Layer:
    """Settings from one source: its description for reports, and its path if it is a file.

    errors: the errors of its invalid values. notices: warnings about it.
    """

    origin: str
    values: Mapping[str, Any]
    path: Path | None = None
    errors: Sequence[LinfusionError] = ()
    notices: Sequence[str] = ()

    def origin_of(self, setting: str) -> str:
        """Return the description of the source: for an environment variable, its name."""
        return PREFIX + setting.upper() if self.origin == ENVIRONMENT else self.origin


@dataclass(frozen=True)
class Settings:
    """Merged settings, the layer that each came from, and the errors of all layers."""

    values: Mapping[str, Any]
    layers: Mapping[str, Layer]
    errors: Sequence[LinfusionError] = field(default=())

    def origins(self) -> dict[str, str]:
        """Return {setting: origin of its value} for all settings of a request."""
        return {name: self.layers[name].origin_of(name) if name in self.layers else "default" for name in SETTINGS}


def read_flag_layer(given: Mapping[str, Any]) -> Layer:
    """Parse the options given on the command line; None means "not given"."""
    values, problems = parse_values({name: value for name, value in given.items() if value is not None}, "flag")
    errors = [
        UsageError(f"{flag(name)} {format_given(problem.value)} {problem.reason}.", problem.hint, name)
        for problem in problems
        if (name := problem.name) is not None
    ]
    return Layer(FLAG, values, errors=errors)


def format_given(value: Any) -> str:
    """Return the text of an option in quotes; several occurrences are separated by commas."""
    return repr(",".join(map(str, value)) if isinstance(value, list | tuple) else value)


def read_environment_layer(environ: Mapping[str, str]) -> Layer:
    """Parse the LINFUSION_* variables that are settings, and warn about unknown ones."""
    known = select_settings("environment")
    given = {name: environ[setting.variable] for name, setting in known.items() if setting.variable in environ}
    values, problems = parse_values(given, "environment")
    errors = [
        UsageError(
            f"{PREFIX}{problem.key.upper()}={problem.value!r} {problem.reason}.", problem.hint or "Correct or unset it."
        )
        for problem in problems
    ]
    variables = [setting.variable for setting in known.values()]
    notices = [warn_unknown(name, variables) for name in environ if name.startswith(PREFIX) and name not in variables]
    return Layer(ENVIRONMENT, values, errors=errors, notices=list(filter(None, notices)))


def warn_unknown(name: str, variables: Sequence[str]) -> str:
    """Return the warning about a LINFUSION_* variable that is not a setting; nothing for the program's others."""
    if name in OTHER_VARIABLES:
        return ""
    if (setting := ALL_SETTINGS.get(name.removeprefix(PREFIX).lower())) is not None:
        return f"{name} is ignored: this setting cannot be a variable. Use {setting.flag}."
    similar = difflib.get_close_matches(name, [*variables, *OTHER_VARIABLES], 1)
    return f"{name} is ignored: there is no such setting.{f' Did you mean {similar[0]}?' if similar else ''}"


def read_config_layer(environ: Mapping[str, str]) -> tuple[Layer, str | None]:
    """Read the user's config file if it exists -> its settings, and the preset that it names."""
    path = find_config_file(environ)
    if not is_file(path):
        if environ.get(CONFIG_VARIABLE):
            raise InputNotFound(f"The config file {path} does not exist.", f"Correct or unset {CONFIG_VARIABLE}.")
        return Layer("config file", {}, path), None
    table = read_toml(path)
    preset = table.pop(PRESET, None)
    name = None if preset is None else read_config_preset(path, preset)
    return read_file_layer(f"config file {path}", path, table, "config"), name


def read_preset_layer(name: str) -> Layer:
    """Read a preset, given its name or path; raises UsageError, InputNotFound or ConfigError."""
    path = find_preset_file(name)
    return read_file_layer(f"preset {name}", path, read_toml(path), "preset")


def read_file_layer(origin: str, path: Path, table: Mapping[str, Any], source: Source) -> Layer:
    """Parse the settings in the table of a file; its errors name file, line and key."""
    values, problems = parse_values(table, source)
    return Layer(origin, values, path, errors=[build_file_error(path, problem) for problem in problems])


def build_file_error(path: Path, problem: Problem) -> ConfigError:
    """Return the error about a line of a file."""
    place = locate_key(path, problem.key.partition(" ")[0].partition(".")[0])
    if problem.name is None:
        hint = problem.hint or f"Settings are {', '.join(select_settings('preset'))}."
        return ConfigError(f"{place}: there is no setting {problem.key!r}.", hint)
    value = "" if problem.value is None else f" = {problem.value!r}"
    return ConfigError(f"{place}: {problem.key}{value} {problem.reason}.", problem.hint or "Correct that line.")


def raise_errors(layer: Layer) -> Layer:
    """Return the layer; raise its errors if it has any."""
    raise_all(layer.errors)
    return layer


def merge(layers: Sequence[Layer]) -> Settings:
    """Merge `layers`; of several values for one setting, the first layer's counts.

    If several layers have models of a group (ControlNets, IP-Adapters), only the first one's settings of this group
    count: the images and scales of the others belong to their own models.
    """
    values: dict[str, Any] = {}
    origins: dict[str, Layer] = {}
    for layer in layers:
        replaced = list_group_settings(values.keys() & layer.values.keys())
        new = {name: value for name, value in layer.values.items() if name not in values and name not in replaced}
        values |= new
        origins |= dict.fromkeys(new, layer)
    return Settings(values, origins, [error for layer in layers for error in layer.errors])


def list_group_settings(names: Iterable[str]) -> set[str]:
    """Return all settings of the groups whose models are among `names`."""
    return {name for group in names if group in MEMBERS for name in MEMBERS[group].values()}


def build_request(settings: Settings) -> Request:
    """Build the request: an upscale if there is an image. Settings of commands are left out.

    Raises UsageError, or ConfigError if the wrong value is in a file. All wrong values are reported together, before a
    missing one.
    """
    values = {name: value for name, value in settings.values.items() if name in SETTINGS}
    optional = ("prompt",) if values.get("image") is not None else ()
    missing = [name for name in PLACEHOLDERS if name not in values and name not in optional]
    try:
        request, errors = assemble_request({name: PLACEHOLDERS[name] for name in missing} | values), []
    except UsageError as error:
        request, errors = None, list(map_origins(list_errors(error), settings))
    raise_all([*settings.errors, *errors])
    assert request is not None  # otherwise there is an error
    if missing:
        raise UsageError(f"No {missing[0]} was given.", HINTS.get(missing[0], ""), missing[0])
    return request


def map_origins(errors: Iterable[LinfusionError], settings: Settings) -> Iterable[LinfusionError]:
    """Yield the errors, with the variable or the line of the file that each wrong value comes from."""
    for error in errors:
        name = getattr(error, "setting", None) or ""
        layer = settings.layers.get(name)
        if layer is None or layer.origin in (FLAG, JOB):
            yield error
        elif layer.path is None:
            yield UsageError(f"{layer.origin_of(name)}: {error.message}", error.hint, name)
        else:
            yield ConfigError(f"{locate_key(layer.path, name)}: {error.message}", error.hint)
