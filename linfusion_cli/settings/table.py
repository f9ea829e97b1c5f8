"""The table of all settings, and the conversion of a request to flat values and back.

Flat values have one entry per setting: the i-th value of `control_image` belongs to the i-th ControlNet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from linfusion_cli.core.errors import UsageError
from linfusion_cli.settings.checks import build_error, find_invalid_value, flag, list_errors, raise_all
from linfusion_cli.settings.command_options import CommandOptions
from linfusion_cli.settings.execution import ExecutionOptions
from linfusion_cli.settings.groups import ControlNet, ImageSource, IpAdapter, match_by_position
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.setting import ITEM, KEY, NESTED, Command, Network, Setting, Source, list_settings

GROUPS: dict[str, type] = {"ip_adapter": IpAdapter, "controlnet": ControlNet}


def build_table(*tables: type) -> dict[str, Setting]:
    """Return the settings by name; raise ValueError if two settings have a name or alias in common."""
    settings = [setting for table in tables for setting in list_settings(table)]
    names = [name for setting in settings for name in (setting.name, *setting.aliases)]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"names of more than one setting: {', '.join(duplicates)}")
    return {setting.name: setting for setting in settings}


SETTINGS = build_table(Request)  # of a request
ALL_SETTINGS = build_table(Request, CommandOptions)
EXECUTION_SETTINGS = {setting.name for setting in list_settings(ExecutionOptions)}
# Members of groups, by the setting of the group's model: {"controlnet": {"image": "control_image", …}}
MEMBERS = {
    group: {field.name: field.metadata[KEY]["name"] for field in dataclasses.fields(item)}
    for group, item in GROUPS.items()
}


def select_settings(source: Source) -> dict[str, Setting]:
    """Return the settings that this source can have, by name."""
    return {name: setting for name, setting in ALL_SETTINGS.items() if source in setting.sources}


def select_options(command: Command) -> list[Setting]:
    """Return the settings that are options or arguments of a command."""
    options = [setting for setting in ALL_SETTINGS.values() if command in setting.commands]
    return sorted(options, key=lambda setting: setting.rank)


def list_reloading_settings(network: Network | None = None) -> list[str]:
    """Return the settings that decide how a network, or any of them, is loaded."""
    return [
        name for name, setting in SETTINGS.items() if network in setting.reloads or (setting.reloads and not network)
    ]


def assemble_request(values: Mapping[str, Any]) -> Request:
    """Return the request with these flat values; raise UsageError with all that are invalid."""
    values = {"prompt": ""} | dict(values) if values.get("image") is not None else values
    errors = [error for group in GROUPS for error in find_group_errors(group, values)]
    given: dict[str, Any] = {}
    for field in dataclasses.fields(Request):
        if ITEM in field.metadata:
            given[field.name] = () if errors else match_by_position(GROUPS[field.name], MEMBERS[field.name], values)
        elif NESTED in field.metadata:
            given[field.name] = _assemble_nested(field.metadata[NESTED], values)
        elif field.name in values:
            given[field.name] = values[field.name]
    try:
        request = Request(**given)
    except UsageError as error:
        raise_all([*errors, *list_errors(error)])
        raise
    raise_all(errors)
    return request


def _assemble_nested(item: type, values: Mapping[str, Any]) -> Any:
    """Return the dataclass `item`; None for the source image if there is none."""
    if item is ImageSource and values.get("image") is None:
        return None
    return item(**{setting.name: values[setting.name] for setting in list_settings(item) if setting.name in values})


def find_group_errors(group: str, values: Mapping[str, Any]) -> Iterator[UsageError]:
    """Yield an error for each flat list of a group with an invalid value, or that does not match the other lists."""
    names = MEMBERS[group]
    for name in names.values():
        yield from find_invalid_value(SETTINGS[name], tuple(values.get(name) or ()))
    models, images, scales = (tuple(values.get(names[part]) or ()) for part in ("model", "image", "scale"))
    if len(images) != len(models):
        reason = f"{flag(names['image'])} is given {len(images)} times, and {flag(group)} {len(models)} times."
        yield UsageError(reason, "Give one image for each, in the same order.", names["image"])
    if len(scales) > max(1, len(models)):  # one scale, as in a config file, is possible without a model
        hint = f"Give one number for each {flag(group)}, or fewer: the last holds for the rest."
        yield build_error(names["scale"], scales, hint)
    if len(values.get(names.get("type", "")) or ()) > len(models):
        reason = f"{flag(names['type'])} is given more often than {flag(group)}."
        yield UsageError(reason, "Give one for each union model.", names["type"])


def flatten_request(request: Request) -> dict[str, Any]:
    """Return the flat values of a request, including its execution options."""
    return dict(_flatten(request))


def _flatten(table: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if ITEM in field.metadata:
            for part, name in MEMBERS[field.name].items():
                values = (getattr(one, part) for one in value)
                yield name, tuple(one for one in values if one is not None)
        elif NESTED in field.metadata:
            none = ((setting.name, None) for setting in list_settings(field.metadata[NESTED]))
            yield from none if value is None else _flatten(value)
        else:
            yield field.metadata[KEY].get("name", field.name), value
