"""JSON Schemas of job lists, presets and reports, generated from the table of settings and the report's dataclasses."""

from __future__ import annotations

import dataclasses
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from linfusion_cli.core.geometry import Size
from linfusion_cli.core.report import SCHEMA as REPORT_SCHEMA
from linfusion_cli.core.report import RunReport
from linfusion_cli.settings.checks import describe_choices
from linfusion_cli.settings.setting import Setting, Source, list_own_settings
from linfusion_cli.settings.table import ALL_SETTINGS, GROUPS, select_settings

DIALECT = "https://json-schema.org/draft/2020-12/schema"
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", Size: "string"}


def build_job_schema() -> dict[str, Any]:
    """Return the schema of a line of a job list."""
    schema = _build_settings_schema("A job of `linfusion batch`: one line of a .jsonl file.", "job")
    prompts = [name for name, setting in select_settings("job").items() if setting.name in ("prompt", "image")]
    keys = [key for name in prompts for key in (name, *ALL_SETTINGS[name].aliases)]
    return schema | {"anyOf": [{"required": [key]} for key in keys]}


def build_preset_schema() -> dict[str, Any]:
    """Return the schema of a preset, a TOML file."""
    return _build_settings_schema("A preset of linfusion.", "preset")


def _build_settings_schema(title: str, source: Source) -> dict[str, Any]:
    settings = select_settings(source)
    properties = {name: build_value_schema(setting) for name, setting in settings.items()}
    aliases = {alias: properties[name] for name, setting in settings.items() for alias in setting.aliases}
    return {
        "$schema": DIALECT,
        "title": title,
        "type": "object",
        "properties": properties | aliases,
        "additionalProperties": False,
    }


def build_value_schema(setting: Setting) -> dict[str, Any]:
    """Return the schema of the value of a setting; the models of a group can be tables."""
    schema = dict(setting.kind.schema)
    if setting.name in GROUPS:
        table = build_group_schema(GROUPS[setting.name])
        schema = {"anyOf": [*schema["anyOf"], table, {"type": "array", "items": table}]}
    hint = f" Use {describe_choices(setting)}." if setting.choices else ""
    return schema | {"description": setting.help + hint}


def build_group_schema(item: type) -> dict[str, Any]:
    """Return the schema of a table of a group, such as [[controlnet]]."""
    own = list_own_settings(item)
    properties = {name: dict(setting.kind.schema) | {"description": setting.help} for name, setting in own.items()}
    return {"type": "object", "properties": properties, "required": ["model"], "additionalProperties": False}


def build_report_schema() -> dict[str, Any]:
    """Return the schema of the report of a run."""
    report = build_dataclass_schema(RunReport)
    extra = {"schema": {"const": REPORT_SCHEMA}, "peak_host_bytes": _nullable("integer")}
    extra |= {"peak_device_bytes": _nullable("integer")}
    properties = extra | report["properties"]
    return {"$schema": DIALECT, "title": "The report of a run.", **report, "properties": properties}


def build_dataclass_schema(table: type) -> dict[str, Any]:
    """Return the schema of the JSON form of a dataclass."""
    hints = get_type_hints(table)
    properties = {field.name: build_type_schema(hints[field.name]) for field in dataclasses.fields(table)}
    return {"type": "object", "properties": properties, "required": list(properties)}


def build_type_schema(hint: Any) -> dict[str, Any]:
    """Return the schema of a type in a report."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        schemas = [build_type_schema(one) for one in arguments]
        return {"anyOf": schemas}
    if hint is type(None):
        return {"type": "null"}
    if get_origin(hint) is list:
        return {"type": "array", "items": build_type_schema(arguments[0])}
    if get_origin(hint) is dict:
        return {"type": "object"}
    if dataclasses.is_dataclass(hint) and hint is not Size:
        return build_dataclass_schema(hint)  # pyright: ignore[reportArgumentType]
    return {"type": JSON_TYPES[hint]} if hint in JSON_TYPES else {}


def _nullable(name: str) -> dict[str, Any]:
    return {"type": [name, "null"]}


SCHEMAS = {"job": build_job_schema, "preset": build_preset_schema, "report": build_report_schema}
