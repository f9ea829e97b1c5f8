"""The fields of a job: the settings of a request, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.text import quote, shorten
from linfusion_cli.settings.checks import raise_all
from linfusion_cli.settings.sources.values import Problem, find_setting, parse_values
from linfusion_cli.settings.table import select_settings

EMPTY = "Empty job: a prompt is required."
FIELDS = select_settings("job")
FILE_NAMES = ("output", "preview")  # relative to the output folder


def is_field(name: str) -> bool:
    """Return whether `name` is a field of a job, in any spelling."""
    return find_setting(name, FIELDS) is not None


def read_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parsed values of a job; raise UsageError with all invalid ones."""
    if not raw:
        raise UsageError(EMPTY)
    raise_all(error for name, value in raw.items() for error in find_text_errors(name, value))
    values, problems = parse_values(raw, "job")
    raise_all(map(build_field_error, problems))
    values |= {name: str(values[name]) for name in FILE_NAMES if name in values}
    if not values.get("prompt", "-").strip() and "image" not in values:
        raise UsageError("The prompt is empty.")
    return values


def build_field_error(problem: Problem) -> UsageError:
    """Return the error about a field."""
    if problem.name is None:
        return UsageError(f"Unknown field {quote(problem.key)}.", problem.hint)
    value = "" if problem.value is None else f" {quote(problem.value)}"
    return UsageError(f"{problem.key}{value} {shorten(problem.reason)}.", problem.hint)


def find_text_errors(name: str, value: Any) -> list[UsageError]:
    """Return an error for each text of a field that files and encoders cannot hold."""
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    errors = []
    for text in texts:
        if any(letter == "\0" or 0xD800 <= ord(letter) <= 0xDFFF for letter in text):
            problem = "a NUL character" if "\0" in text else "half of a surrogate pair"
            errors.append(UsageError(f"{name} contains {problem}."))
    return errors
