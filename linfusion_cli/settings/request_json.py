"""The JSON form of a request, in metadata, reports and checkpoints; metadata of earlier versions are converted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linfusion_cli.core.geometry import Size
from linfusion_cli.core.units import parse_size
from linfusion_cli.settings.checks import raise_all
from linfusion_cli.settings.groups import match_by_position
from linfusion_cli.settings.kinds import SIZE, Kind
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.table import EXECUTION_SETTINGS, GROUPS, MEMBERS, SETTINGS, find_group_errors

SCHEMA = 2
SCHEMA_KEY = "schema"
FIRST_SCHEMA = 1  # of version 0.1, which stored flat values, execution options included, and no schema number


def request_to_json(request: Request) -> dict[str, Any]:
    """Return what decides the image: the schema number, and the request without its execution options."""
    fields = [field.name for field in dataclasses.fields(request) if field.name != "execution"]
    return {SCHEMA_KEY: SCHEMA} | {name: to_json_value(getattr(request, name)) for name in fields}


def execution_to_json(request: Request) -> dict[str, Any]:
    """Return the execution options of a request."""
    return to_json_value(request.execution)


def to_json_value(value: Any) -> Any:
    """Return `value` as JSON, which has no Infinity: an infinite number becomes text that parses as a number."""
    if isinstance(value, dict):
        return {key: to_json_value(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return [to_json_value(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, Size | type):
        return {field.name: to_json_value(getattr(value, field.name)) for field in dataclasses.fields(value)}
    is_infinite = isinstance(value, float) and math.isinf(value)
    return str(value) if is_infinite or isinstance(value, Path | Size) else value


def values_from_json(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat values of a request in JSON, of any schema up to this one, with defaults for missing settings.

    Execution options, which the first schema contains, and keys that are not settings are left out. Raises
    ValueError or UsageError for invalid values or a later schema.
    """
    schema = request.get(SCHEMA_KEY, FIRST_SCHEMA)
    if schema not in (FIRST_SCHEMA, SCHEMA):
        raise ValueError(f"schema {schema} is not known to this version")
    flat = flatten_groups(request) if schema == SCHEMA else request
    known = {name: setting for name, setting in SETTINGS.items() if name not in EXECUTION_SETTINGS}
    parsed = {name: parse_stored(one.kind, flat[name]) for name, one in known.items() if flat.get(name) is not None}
    defaults = {name: setting.default for name, setting in known.items() if not setting.is_required}
    values = defaults | parsed
    for group, item in GROUPS.items():
        raise_all(find_group_errors(group, values))
        values |= flatten_group(group, match_by_position(item, MEMBERS[group], values))
    return values


def parse_stored(kind: Kind, value: Any) -> Any:
    """Return the value of a setting in JSON. Sizes were checked when they were set, and can be smaller."""
    return parse_size(value, 1) if kind is SIZE else kind.parse(value)


def identity_from_json(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the content of a file: the flat values that do, and all keys that are not settings.

    Raises ValueError or UsageError, see `values_from_json`.
    """
    values = values_from_json(request)
    identity = {name: value for name, value in values.items() if SETTINGS[name].decides != "nothing"}
    known = {SCHEMA_KEY, "source", *SETTINGS}
    return identity | {name: value for name, value in request.items() if name not in known}


def flatten_groups(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request in JSON with flat lists in place of groups, and the settings of its source image."""
    flat = dict(request)
    for group, members in MEMBERS.items():
        tables = flat.pop(group, None) or ()
        flat |= {name: [one[part] for one in tables if one.get(part) is not None] for part, name in members.items()}
    return flat | (flat.pop("source", None) or {})


def flatten_group(group: str, items: tuple) -> dict[str, Any]:
    """Return the flat lists of groups."""
    return {
        name: tuple(getattr(one, part) for one in items if getattr(one, part) is not None)
        for part, name in MEMBERS[group].items()
    }
