"""Parse the settings of one source: the command line, the environment, a config file, a preset, or a job."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linfusion_cli.core.errors import UsageError
from linfusion_cli.settings.setting import Setting, Source
from linfusion_cli.settings.table import MEMBERS, SETTINGS, select_settings

# Names in other tools that no single setting corresponds to.
SIZE_NAMES = ("width", "height", "w", "h")
COUNT_NAMES = ("batch_size", "batch_count", "n_iter", "num_images", "num_images_per_prompt")
OTHER_NAMES: dict[str, str] = {
    **dict.fromkeys(SIZE_NAMES, 'Use size, such as "1024x768" (width x height).'),
    **dict.fromkeys(COUNT_NAMES, "Use --seeds 1-4 of `linfusion batch` for several images."),
}


@dataclass(frozen=True)
class Problem:
    """An invalid value or key. `reason` continues the sentence that starts with the key and the value.

    name: the setting, None for an unknown key.
    """

    key: str
    name: str | None
    value: Any
    reason: str
    hint: str = ""


def parse_values(raw: Mapping[str, Any], source: Source) -> tuple[dict[str, Any], list[Problem]]:
    """Return the parsed values by setting, and the problems of those that are invalid.

    Keys are names or aliases of settings; ControlNets and IP-Adapters can be tables.
    """
    known = select_settings(source)
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    keys: dict[str, str] = {}  # setting -> the key that gave its value
    for key, name, value in expand_groups(raw, problems):
        setting = find_setting(name, known)
        if setting is None:
            problems.append(Problem(key, None, value, "is not a setting", build_key_hint(name, known)))
        elif setting.name in keys:
            reason = f"and {keys[setting.name]} are the same setting" if keys[setting.name] != key else "is given twice"
            problems.append(Problem(key, setting.name, None, reason, f"Keep one of them: {setting.name}."))
        else:
            keys[setting.name] = key
            try:
                values[setting.name] = setting.kind.parse(value)
            except (ValueError, OverflowError) as error:
                problems.append(Problem(key, setting.name, value, str(error)))
            except UsageError as error:
                problems.append(Problem(key, setting.name, value, "is invalid", error.hint))
    return values, problems


def normalize_key(key: str) -> str:
    """Return a key as settings spell it: "Negative Prompt", negativePrompt and negative-prompt -> negative_prompt."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key.strip())
    return re.sub(r"[\s\-_]+", "_", words).lower()


def find_setting(key: str, known: Mapping[str, Setting]) -> Setting | None:
    """Return the setting with this name or alias, in any spelling."""
    name = normalize_key(key)
    if name in known:
        return known[name]
    return next((setting for setting in known.values() if name in setting.aliases), None)


def build_key_hint(key: str, known: Mapping[str, Setting]) -> str:
    """Return the hint for an unknown key: the nearest name."""
    name = normalize_key(key)[:80]
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    similar = find_nearest(name, known)
    return f"Did you mean {similar}?" if similar else ""


def find_nearest(name: str, known: Mapping[str, Setting]) -> str | None:
    """Return the setting whose name or alias is nearest to `name`; None if none is near."""
    owners = {alias: setting.name for setting in known.values() for alias in (setting.name, *setting.aliases)}
    nearest = difflib.get_close_matches(name, owners, 1)
    return owners[nearest[0]] if nearest else None


def expand_groups(raw: Mapping[str, Any], problems: list[Problem]) -> Iterator[tuple[str, str, Any]]:
    """Yield key, setting and value, with the tables of a group as flat lists; add problems of tables."""
    for key, value in raw.items():
        members = MEMBERS.get(normalize_key(key))
        tables = [value] if isinstance(value, Mapping) else value
        if members is None or not isinstance(tables, list | tuple) or not any(isinstance(t, Mapping) for t in tables):
            yield key, key, value
        elif (problem := find_table_problem(key, tables, members)) is not None:
            problems.append(problem)
        else:
            for part, name in members.items():
                if parts := list_parts(tables, part, SETTINGS[name]):
                    yield f"{key}.{part}", name, parts


def list_parts(tables: Sequence[Mapping[str, Any]], part: str, setting: Setting) -> list[Any]:
    """Return this part of each table, with the default for tables without it; nothing if no table has it."""
    if all(table.get(part) is None for table in tables):
        return []
    default = setting.default[0] if setting.default else None
    parts = (default if table.get(part) is None else table[part] for table in tables)
    return [one for one in parts if one is not None]


def find_table_problem(key: str, tables: Any, members: Mapping[str, str]) -> Problem | None:
    """Return the problem of a list of tables: other values, unknown keys, or images that only some of them have."""
    allowed = f"Use {', '.join(members)}."
    for number, table in enumerate(tables, 1):
        label = f"{key} {number}"
        if not isinstance(table, Mapping):
            return Problem(label, key, table, "must be a table", allowed)
        if unknown := next((part for part in table if part not in members), None):
            return Problem(label, key, None, f"has the unknown key {unknown!r}", allowed)
        if "model" not in table:
            return Problem(label, key, None, "has no model", allowed)
    given = [table.get("image") is not None for table in tables]
    if any(given) and not all(given):
        return Problem(f"{key} {given.index(False) + 1}", key, None, "has no image", "Give an image to each.")
    return None
