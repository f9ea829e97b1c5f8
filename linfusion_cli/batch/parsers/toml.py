"""TOML lists: one [[job]] table per job."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from linfusion_cli.batch.parsers.job_spec import JobSpec, parse_job
from linfusion_cli.batch.parsers.line_reader import MAX_JOB_BYTES, TOO_LONG, Line
from linfusion_cli.batch.parsers.list_format import TABLE
from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.text import shorten

POSITION = re.compile(r" \(at .*\)$")  # in messages of tomllib: relative to the table, not to the file
OUTSIDE_TABLE = "Settings before the first [[job]] belong to no job."


def read_toml(lines: Iterator[Line]) -> Iterator[JobSpec]:
    """Yield a job for each [[job]] table, parsed separately to confine errors to one job.

    Settings before the first table are one invalid job; a file without tables has no jobs.
    """
    table, count = _Table(0), 0
    for line in lines:
        if TABLE.fullmatch(line.text) and not line.problem:
            yield from table.build_specs()
            table, count = _Table(line.number), count + 1
        else:
            table.add(line)
    if count:
        yield from table.build_specs()


@dataclass
class _Table:
    """The lines below a [[job]] on line `number`; 0 for the lines before the first table."""

    number: int
    body: list[str] = field(default_factory=list)
    length: int = 0
    problem: str = ""

    def add(self, line: Line) -> None:
        if not self.number:
            has_content = bool(line.problem) or not re.match(r"\s*(#|$)", line.text)
            self.number, self.problem = (line.number, OUTSIDE_TABLE) if has_content else (0, "")
            return
        self.length += len(line.text) + 1
        self.problem = self.problem or line.problem or (TOO_LONG if self.length > MAX_JOB_BYTES else "")
        if not self.problem:
            self.body.append(line.text)

    def build_specs(self) -> Iterator[JobSpec]:
        """Yield the job; nothing for blank lines and comments before the first table."""
        if self.number:
            yield parse_job(Line(self.number, "\n".join(self.body), self.problem), parse_table)


def parse_table(text: str) -> dict[str, Any]:
    """Return the settings of a table; raise UsageError. Its groups are written [[controlnet]] or [[job.controlnet]]."""
    try:
        values = tomllib.loads(text)
    except ValueError as error:
        raise UsageError(f"Invalid TOML: {shorten(POSITION.sub('', str(error)))}.") from error
    groups = values.get("job")
    return (
        values
        if not isinstance(groups, dict)
        else {name: value for name, value in {**values, **groups}.items() if name != "job"}
    )
