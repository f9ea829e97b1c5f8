"""JSONL lists: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from linfusion_cli.batch.parsers.job_spec import JobSpec, parse_job
from linfusion_cli.batch.parsers.line_reader import Line
from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.text import quote, shorten


def read_jsonl(lines: Iterator[Line]) -> Iterator[JobSpec]:
    """Yield a job for each line that is not blank."""
    for line in lines:
        if line.problem or line.text.strip():
            yield parse_job(line, parse_json_object)


def parse_json_object(text: str) -> dict[str, Any]:
    """Return the JSON object in `text`; raise UsageError."""
    try:
        value = json.loads(text, object_pairs_hook=_reject_duplicates, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        raise UsageError(f"Invalid JSON: {error.msg} (column {error.colno}).") from error
    except ValueError as error:  # a number with thousands of digits
        raise UsageError(f"Invalid JSON: {shorten(str(error))}.") from error
    if not isinstance(value, dict):
        raise UsageError(f"Not a JSON object: {quote(value)}.")
    return value


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise UsageError(f"{quote(next(name for name in names if names.count(name) > 1))} is given twice.")
    return values


def _reject_constant(name: str) -> NoReturn:
    raise UsageError(f"Invalid JSON: {name} is not a JSON number.")
