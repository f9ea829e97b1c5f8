"""CSV lists: a header with the names of fields, and one record per job."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from typing import Any

from linfusion_cli.batch.parsers.job_spec import JobSpec, parse_job
from linfusion_cli.batch.parsers.line_reader import MAX_JOB_BYTES, Line
from linfusion_cli.batch.parsers.list_format import SEPARATORS
from linfusion_cli.batch.parsers.schema import FIELDS, is_field
from linfusion_cli.core.errors import DataError, UsageError
from linfusion_cli.core.text import quote, shorten
from linfusion_cli.settings.sources.values import find_setting


def read_csv(lines: Iterator[Line]) -> Iterator[JobSpec]:
    """Yield a job for each record that is not blank; raise DataError if the header is invalid."""
    records = read_records(lines)
    header, names = next(((line, cells) for line, cells in records if line.problem or any(cells)), (None, []))
    if header is None:
        return
    if problem := header.problem or find_header_problem(names):
        raise DataError(f"The CSV header in line {header.number} is invalid.", problem)
    for line, cells in records:
        if line.problem or any(cells):
            yield parse_job(line, lambda _, cells=cells: name_cells(names, cells))


def find_header_problem(names: list[str]) -> str | None:
    """Return a sentence on an unknown or repeated field; None if the header is valid."""
    unknown = next((name for name in names if not is_field(name)), None)
    if unknown is not None:
        hint = " Separate the columns by commas." if SEPARATORS.search(unknown) else ""
        return f"Unknown field {quote(unknown)}.{hint}"
    fields = [setting.name for name in names if (setting := find_setting(name, FIELDS)) is not None]
    return "A field is named twice." if len(set(fields)) < len(fields) else None


def name_cells(names: list[str], cells: list[str]) -> dict[str, Any]:
    """Return the cells that are not empty, by field; raise UsageError if there are more cells than fields."""
    if len(cells) > len(names):
        raise UsageError(f"The record has {len(cells)} cells; the header has {len(names)}.")
    return {name: cell for name, cell in zip(names, cells, strict=False) if cell}


def read_records(lines: Iterator[Line]) -> Iterator[tuple[Line, list[str]]]:
    """Yield the first line and the cells of each record.

    An unclosed quote invalidates only its own line: the lines after it are read again.
    """
    pending: deque[Line] = deque()
    while True:
        consumed: list[Line] = []
        try:
            cells = next(csv.reader(_feed_lines(consumed, pending, lines), strict=True), None)
        except (csv.Error, UsageError) as error:
            pending.extendleft(reversed(consumed[1:]))
            first = consumed[0]
            yield Line(first.number, "", first.problem or f"Invalid CSV: {shorten(str(error))}."), []
            continue
        if cells is None:
            return
        yield consumed[0], [cell.strip() for cell in cells]


def _feed_lines(consumed: list[Line], pending: deque[Line], lines: Iterator[Line]) -> Iterator[str]:
    """Yield the text of line after line, adding each to `consumed`; raise UsageError if a record cannot continue."""
    length = 0
    while (line := pending.popleft() if pending else next(lines, None)) is not None:
        consumed.append(line)
        length += len(line.text)
        if line.problem or length > MAX_JOB_BYTES:
            raise UsageError("a quote is not closed")
        yield line.text + "\n"
