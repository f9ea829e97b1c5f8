"""One job of a list, as it was read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from linfusion_cli.batch.parsers.line_reader import Line
from linfusion_cli.batch.parsers.schema import read_fields
from linfusion_cli.core.errors import LinfusionError
from linfusion_cli.core.text import shorten

MAX_PROBLEM_CHARS = 300  # of the description of a problem
TOO_NESTED = "The job is nested too deeply."


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job of a list: its first line and its settings, or the `problem` that makes it invalid."""

    line: int
    values: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def parse_job(line: Line, parse: Callable[[str], dict[str, Any]]) -> JobSpec:
    """Return the job in `line`, which `parse` turns into a dict; any error becomes the problem of the job."""
    if line.problem:
        return JobSpec(line.number, problem=line.problem)
    try:
        return JobSpec(line.number, read_fields(parse(line.text)))
    except LinfusionError as error:
        return JobSpec(line.number, problem=shorten(str(error), MAX_PROBLEM_CHARS))
    except RecursionError:
        return JobSpec(line.number, problem=TOO_NESTED)
