"""Find presets, and read preset and config files. Errors name file, line and key."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from linfusion_cli.core.errors import ConfigError, InputNotFound, UsageError
from linfusion_cli.core.fs import expand_home, is_file, is_folder

PACKAGE = Path(__file__).parents[2]
CONFIG_VARIABLE = "LINFUSION_CONFIG"
PATH_VARIABLE = "LINFUSION_PRESET_PATH"
CPU_HALF_VARIABLE = "LINFUSION_CPU_HALF"  # of the tests of half precision
OTHER_VARIABLES = (CONFIG_VARIABLE, PATH_VARIABLE, CPU_HALF_VARIABLE)  # that are not settings
BUILT_IN = "built in"


@dataclass(frozen=True)
class Preset:
    """A preset file: the name that --preset takes, and its source: built in, or a folder of the user.

    `shadowed_by` is the file of the same name that precedes it; this one can be used by its path only.
    """

    name: str
    path: Path
    source: str
    shadowed_by: Path | None = None


def find_presets() -> list[Preset]:
    """Find all presets: those in LINFUSION_PRESET_PATH, the built-in ones, and those in the user's config folder.

    Of several with one name the first is used: only a folder that was named explicitly can replace a built-in preset.
    """
    found: list[Preset] = []
    used: dict[str, Path] = {}
    for folder, source in list_preset_folders():
        for path in sorted(folder.glob("[!.]*.toml"), key=lambda path: path.stem):
            found.append(Preset(path.stem, path, source, used.get(path.stem)))
            used.setdefault(path.stem, path)
    return found


def list_preset_folders() -> Iterator[tuple[Path, str]]:
    """Yield each existing folder of presets with its source, in the order of precedence."""
    for name in os.environ.get(PATH_VARIABLE, "").split(os.pathsep):
        if name and is_folder(folder := expand_home(name)):
            yield folder, str(folder)
    yield find_built_in_folder(PACKAGE), BUILT_IN
    own = platformdirs.user_config_path("linfusion") / "presets"
    if is_folder(own):
        yield own, str(own)


def find_built_in_folder(package: Path) -> Path:
    """Return the folder of the built-in presets: inside the package in a wheel, next to it in a checkout.

    An editable install is a checkout. Raises ConfigError if the installation is incomplete.
    """
    if (package / "_presets").is_dir():
        return package / "_presets"
    if (package.parent / "pyproject.toml").is_file() and (package.parent / "presets").is_dir():
        return package.parent / "presets"
    raise ConfigError(f"The installation in {package} has no presets.", "Install linfusion again.")


def list_preset_names() -> list[str]:
    """Return the names that --preset takes."""
    return [preset.name for preset in find_presets() if preset.shadowed_by is None]


def is_preset_file(name: str) -> bool:
    """Return whether `name` is the path of a preset file, and not a preset's name."""
    return name.endswith(".toml")


def find_preset_file(name: str) -> Path:
    """Return the file of a preset, given its name or path; raises UsageError or InputNotFound."""
    if not is_preset_file(name):
        found = next((preset.path for preset in find_presets() if preset.name == name), None)
        if found is None:
            raise UsageError(f"There is no preset {name!r}.", build_preset_hint())
        return found
    path = expand_home(name)
    if not is_file(path):
        raise InputNotFound(f"The preset file {path} does not exist.", "Check the path.")
    return path


def build_preset_hint() -> str:
    """Return the hint of an error about an unknown preset."""
    return f"Use one of {', '.join(list_preset_names())}, or the path of a .toml file."


def find_config_file(environ: Mapping[str, str]) -> Path:
    """Return the user's config file: LINFUSION_CONFIG, or `linfusion/config.toml` in the user's config folder."""
    return Path(environ.get(CONFIG_VARIABLE) or platformdirs.user_config_path("linfusion") / "config.toml")


def read_config_preset(path: Path, preset: Any) -> str:
    """Return the preset that the config file at `path` names; a relative path is relative to that file.

    Raises ConfigError for a preset that does not exist.
    """
    if isinstance(preset, str) and is_preset_file(preset):
        file = path.parent / expand_home(preset)
        if not is_file(file):
            raise ConfigError(
                f"{locate_key(path, 'preset')}: the preset file {file} does not exist.", "Check the path."
            )
        return str(file)
    if preset not in list_preset_names():
        raise ConfigError(f"{locate_key(path, 'preset')}: there is no preset {preset!r}.", build_preset_hint())
    return preset


def read_toml(path: Path) -> dict[str, Any]:
    """Read the table in `path`; raises ConfigError with the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.", "Correct that line.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).", "Check its permissions.") from error


def locate_key(path: Path, key: str) -> str:
    """Return file:line of `key`, in the form that editors and compilers use."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pattern = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.\]]|\s*\[+\s*{re.escape(key)}")
    return f"{path}:{next((i for i, line in enumerate(lines, 1) if pattern.match(line)), 1)}"
