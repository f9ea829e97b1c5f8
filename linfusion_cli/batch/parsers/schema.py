"""The fields of a job: the settings of a request, and its files."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.fs import expand_home
from linfusion_cli.core.text import MAX_QUOTED, quote, shorten
from linfusion_cli.settings import PARSERS

EMPTY = "Empty job: a prompt is required."


def _parse_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be text")
    return value


FIELDS: dict[str, Callable[[Any], Any]] = {
    "output": _parse_text,
    "preview": _parse_text,
    "preset": _parse_text,
    "image": lambda value: expand_home(_parse_text(value)),
    **PARSERS,
}


def read_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parsed values of a job; raise UsageError for the first invalid one."""
    if not raw:
        raise UsageError(EMPTY)
    values = {name: _read_field(name, value) for name, value in raw.items()}
    if not values.get("prompt", "-").strip() and "image" not in values:
        raise UsageError("The prompt is empty.")
    return values


def _read_field(name: str, value: Any) -> Any:
    if name not in FIELDS:
        similar = difflib.get_close_matches(name[:MAX_QUOTED], FIELDS, 1)
        raise UsageError(f"Unknown field {quote(name)}.", f"Did you mean {similar[0]}?" if similar else "")
    for text in value if isinstance(value, list) else [value]:
        _check_text(name, text)
    try:
        return FIELDS[name](value)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{name} {quote(value)} {shorten(str(error))}.") from error
    except UsageError as error:
        raise UsageError(f"{name} {quote(value)} is invalid.", error.hint) from error


def _check_text(name: str, text: Any) -> None:
    if isinstance(text, str) and any(letter == "\0" or 0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        problem = "a NUL character" if "\0" in text else "half of a surrogate pair"
        raise UsageError(f"{name} contains {problem}.")
