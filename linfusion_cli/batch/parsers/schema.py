"""What a job of a list may say, and how it is read: the fields of a request, and where its files lie."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.text import MAX_QUOTED, quote, shorten
from linfusion_cli.core.units import user_path
from linfusion_cli.settings import PARSERS

EMPTY = "It says nothing: give it a prompt at least."


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be text")
    return value


FIELDS: dict[str, Callable[[Any], Any]] = {
    "output": _text,
    "preview": _text,
    "preset": _text,
    "image": lambda value: user_path(_text(value)),
    **PARSERS,
}


def read_fields(written: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a job; raises UsageError naming the first that is wrong."""
    if not written:
        raise UsageError(EMPTY)
    values = {name: _read_field(name, value) for name, value in written.items()}
    if not values.get("prompt", "-").strip() and "image" not in values:
        raise UsageError("Its prompt is empty.")
    return values


def _read_field(name: str, value: Any) -> Any:
    if name not in FIELDS:
        near = difflib.get_close_matches(name[:MAX_QUOTED], FIELDS, 1)
        raise UsageError(f"There is no field {quote(name)}.", f"Is {near[0]} meant?" if near else "")
    for text in value if isinstance(value, list) else [value]:
        _check_text(name, text)
    try:
        return FIELDS[name](value)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{name} {quote(value)} {shorten(str(error))}.") from error
    except UsageError as error:
        raise UsageError(f"{name} {quote(value)} is wrong.", error.hint) from error


def _check_text(name: str, text: Any) -> None:
    if isinstance(text, str) and any(letter == "\0" or 0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        what = "a NUL character" if "\0" in text else "half of a surrogate pair, which is no character"
        raise UsageError(f"{name} has {what}.")
