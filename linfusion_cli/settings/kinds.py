"""Kinds of values: each parses text (flags, variables, CSV) and TOML or JSON values, and has a JSON Schema."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linfusion_cli.core.fs import expand_home
from linfusion_cli.core.units import parse_bytes, parse_size

TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    parse: return the value for text, or for a TOML or JSON value; raise ValueError with the rest of the sentence that
        starts with the setting and the text, such as "must be a number".
    schema: the JSON Schema of the value in files.
    metavar: the placeholder in the help.
    """

    parse: Callable[[Any], Any]
    schema: dict[str, Any]
    metavar: str


def _parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


def _parse_path(value: Any) -> Path:
    if isinstance(value, Path):
        return value
    if not _parse_text(value).strip():
        raise ValueError("must be the name of a file")
    return expand_home(value)


def _parse_integer(value: Any) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d+", str(value).strip(), re.ASCII):
        raise ValueError("must be a whole number")
    return int(value)


def _parse_number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError("must be a number") from None


def _parse_boolean(value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in TRUE + FALSE:
        raise ValueError("must be true or false")
    return text in TRUE


def _parse_phase(value: Any) -> str:
    """Parse `base`, `all`, or the index of a phase, which is an integer in TOML."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _parse_text(value).strip()


TEXT = Kind(_parse_text, {"type": "string"}, "TEXT")
PATH = Kind(_parse_path, {"type": "string"}, "FILE")
INTEGER = Kind(_parse_integer, {"type": "integer"}, "N")
NUMBER = Kind(_parse_number, {"type": "number"}, "NUMBER")
BOOLEAN = Kind(_parse_boolean, {"type": "boolean"}, "")
SIZE = Kind(
    lambda value: parse_size(str(value)),
    {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^\s*\d+\s*([xX×]\s*\d+\s*)?$"}]},
    "SIZE",
)
BYTES = Kind(lambda value: parse_bytes(str(value)), {"type": "string", "pattern": "[A-Za-z]"}, "BYTES")
NUMBERS = r"^\s*[-+]?[\d.inf]+(e[-+]?\d+)?\s*(,\s*[-+]?[\d.inf]+(e[-+]?\d+)?\s*)*$"  # separated by commas
PHASE = Kind(_parse_phase, {"type": ["string", "integer"]}, "PHASE")


def list_of(kind: Kind, metavar: str = "") -> Kind:
    """Return the kind of one value, a list of values, or text with values separated by commas."""

    def parse(value: Any) -> tuple:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return tuple(kind.parse(part.strip() if isinstance(part, str) else part) for part in parts)

    text = {"type": "string"} | ({"pattern": NUMBERS} if kind in (INTEGER, NUMBER) else {})
    return Kind(parse, _one_or_many(kind, text), metavar or kind.metavar)


def repeat(kind: Kind) -> Kind:
    """Return the kind of one value or a list of values. A comma in text is part of the value, as in a file's name."""

    def parse(value: Any) -> tuple:
        parts = value if isinstance(value, list | tuple) else [value]
        return tuple(kind.parse(part.strip() if isinstance(part, str) else part) for part in parts)

    return Kind(parse, _one_or_many(kind), kind.metavar)


def _one_or_many(kind: Kind, *others: dict[str, Any]) -> dict[str, Any]:
    schemas = [kind.schema, {"type": "array", "items": kind.schema}, *others]
    return {"anyOf": [schema for i, schema in enumerate(schemas) if schema not in schemas[:i]]}
