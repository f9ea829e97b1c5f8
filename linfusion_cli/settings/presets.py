"""Preset and config files: where they are, and what is wrong with one, by file, line and key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs

from linfusion_cli.core.errors import ConfigError, InputNotFound, UsageError
from linfusion_cli.core.units import is_file, user_path
from linfusion_cli.settings.fields import PARSERS

PACKAGE = Path(__file__).parents[1]
# A wheel has its presets inside the package; a checkout and an editable install have them beside it.
PRESET_FOLDER = next(
    (p for p in (PACKAGE / "_presets", PACKAGE.parent / "presets") if p.is_dir()), PACKAGE / "_presets"
)
CONFIG_VARIABLE = "LINFUSION_CONFIG"


def preset_names() -> list[str]:
    """The presets that come with the program."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.toml"))


def preset_path(name: str) -> Path:
    if name in preset_names():
        return PRESET_FOLDER / f"{name}.toml"
    if not name.endswith(".toml"):
        raise UsageError(
            f"There is no preset {name!r}.", f"Use one of {', '.join(preset_names())}, or the path of a .toml file."
        )
    path = user_path(name)
    if not is_file(path):
        raise InputNotFound(f"The preset file {path} is missing.", "Check the path.")
    return path


def config_path(environ: Mapping[str, str]) -> Path:
    """The user's config file: LINFUSION_CONFIG, or `linfusion/config.toml` where the system keeps such files."""
    return Path(environ.get(CONFIG_VARIABLE) or platformdirs.user_config_path("linfusion") / "config.toml")


def read_toml(path: Path) -> dict[str, Any]:
    """The table in `path`; raises ConfigError with the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.", "Correct that line.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).", "Check its permissions.") from error


def parse_table(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a file's `table`; raises ConfigError with file, line and key."""
    return {key: _parse_entry(path, key, value) for key, value in table.items()}


def _parse_entry(path: Path, key: str, value: Any) -> Any:
    if key not in PARSERS:
        raise ConfigError(f"{place(path, key)}: there is no setting {key!r}.", f"Settings are {', '.join(PARSERS)}.")
    try:
        return PARSERS[key](value)
    except ValueError as error:
        raise ConfigError(f"{place(path, key)}: {key} = {value!r} {error}.", "Correct that line.") from error
    except UsageError as error:
        raise ConfigError(f"{place(path, key)}: {key} = {value!r} is wrong.", error.hint) from error


def place(path: Path, key: str) -> str:
    """file:line of `key`, as editors and compilers write it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pattern = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.\]]|\s*\[+\s*{re.escape(key)}")
    return f"{path}:{next((i for i, line in enumerate(lines, 1) if pattern.match(line)), 1)}"
