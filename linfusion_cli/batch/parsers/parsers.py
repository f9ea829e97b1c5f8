"""Lists of jobs: JSONL, CSV, TOML with [[job]] tables, or text, a prompt a line. A wrong job harms no other."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
import sys
import tomllib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from linfusion_cli.batch.parsers.line_reader import MAX_JOB_BYTES, TOO_LONG, Line, read_lines
from linfusion_cli.batch.parsers.list_format import SEPARATORS, TABLE, Format, check_suffix, recognise_format
from linfusion_cli.batch.parsers.schema import FIELDS, read_fields
from linfusion_cli.core.errors import DataError, InputNotFound, LinfusionError, UsageError, first_line
from linfusion_cli.core.text import quote, shorten
from linfusion_cli.core.units import user_path

STDIN = "-"
MAX_PROBLEM_CHARS = 300  # letters of what is wrong with a job
TOML_PLACE = re.compile(r" \(at .*\)$")
OUTSIDE = "It stands before the first [[job]]."
NESTED = "It is nested too deeply."
WAYS_OUT: dict[Format, str] = {  # of a list without jobs
    "JSONL": 'Write one object per line: {"prompt": "a hill"}',
    "CSV": "Write one job per line below the names of the columns.",
    "TOML": "Begin each job with a line [[job]].",
    "text": "Write one prompt per line; lines that begin with # are comments.",
}


@dataclass(frozen=True, slots=True)
class JobSpec:
    """One job of a list: the line it begins on and what it says, or the `problem` why that cannot be read."""

    line: int
    values: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def read_list(source: str) -> Iterator[JobSpec]:
    """The jobs of a file, of a pipe, or for `-` of standard input, of which there is one at least.

    The format is that of a file's suffix; pipes and files without one are recognised by their first lines. Raises
    InputMissing, or DataError for what is no list or has no jobs.
    """
    path = None if source == STDIN else user_path(source)
    name = "Standard input" if path is None else f"The list {path}"
    with _standard_input() if path is None else _opened(path) as file:
        try:
            if path is not None and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                check_suffix(path)
            yield from _jobs("" if path is None else path.suffix, file, name)
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise DataError(f"{name} cannot be read ({reason}).", "Check where it comes from.") from error


def _jobs(suffix: str, file: BinaryIO, name: str) -> Iterator[JobSpec]:
    list_format, lines = recognise_format(suffix, read_lines(file, name), name)
    jobs = READERS[list_format](lines)
    first = next(jobs, None)
    if first is None:
        raise DataError(f"{name} has no jobs.", WAYS_OUT[list_format])
    yield from chain([first], jobs)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder.", "Name a list of jobs, or use --watch.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputNotFound(f"The list of jobs {path} cannot be read ({reason}).", "Check the path.") from error


def _standard_input() -> AbstractContextManager[BinaryIO]:
    """It stays open; one that is closed is empty."""
    is_open = sys.stdin is not None and not sys.stdin.closed
    return nullcontext(sys.stdin.buffer if is_open else io.BytesIO())


def from_text(lines: Iterator[Line]) -> Iterator[JobSpec]:
    """A prompt a line; those that are blank or begin with # say nothing."""
    for line in lines:
        text = line.text.strip()
        if line.problem or (text and not text.startswith("#")):
            yield parse_job(line, lambda text: {"prompt": text.strip()})


def from_json(lines: Iterator[Line]) -> Iterator[JobSpec]:
    """An object a line."""
    for line in lines:
        if line.problem or line.text.strip():
            yield parse_job(line, json_object)


def parse_job(line: Line, read: Callable[[str], dict[str, Any]]) -> JobSpec:
    """What `read` makes of the line, or what is wrong with it."""
    if line.problem:
        return JobSpec(line.number, problem=line.problem)
    try:
        return JobSpec(line.number, read_fields(read(line.text)))
    except LinfusionError as error:
        return JobSpec(line.number, problem=shorten(str(error), MAX_PROBLEM_CHARS))
    except RecursionError:
        return JobSpec(line.number, problem=NESTED)


def json_object(text: str) -> dict[str, Any]:
    """The object in a line; raises UsageError."""
    try:
        value = json.loads(text, object_pairs_hook=_once_each, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise UsageError(f"It is not JSON: {error.msg}, at letter {error.colno}.") from error
    except ValueError as error:  # a number of thousands of digits
        raise UsageError(f"It is not JSON that can be read: {shorten(str(error))}.") from error
    if not isinstance(value, dict):
        raise UsageError(f"It is no JSON object, but {quote(value)}.")
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise UsageError(f"{quote(next(name for name in names if names.count(name) > 1))} is given twice.")
    return values


def _no_number(name: str) -> None:
    raise UsageError(f"It is not JSON: {name} is no number there.")


def from_toml(lines: Iterator[Line]) -> Iterator[JobSpec]:
    """A [[job]] table each, read apart from the others, so that what is wrong with one stays with it.

    What stands before the first one is a wrong job; a file without any has no jobs.
    """
    table, tables = _Table(0), 0
    for line in lines:
        if TABLE.fullmatch(line.text) and not line.problem:
            yield from table.entries()
            table, tables = _Table(line.number), tables + 1
        else:
            table.add(line)
    if tables:
        yield from table.entries()


@dataclass
class _Table:
    """The lines below a [[job]] on line `number`, or those before the first one, where that is 0."""

    number: int
    body: list[str] = field(default_factory=list)
    length: int = 0
    problem: str = ""

    def add(self, line: Line) -> None:
        if not self.number:
            says = bool(line.problem) or not re.match(r"\s*(#|$)", line.text)
            self.number, self.problem = (line.number, OUTSIDE) if says else (0, "")
            return
        self.length += len(line.text) + 1
        self.problem = self.problem or line.problem or (TOO_LONG if self.length > MAX_JOB_BYTES else "")
        if not self.problem:
            self.body.append(line.text)

    def entries(self) -> Iterator[JobSpec]:
        """The job, if there is one."""
        if self.number:
            yield parse_job(Line(self.number, "\n".join(self.body), self.problem), toml_table)


def toml_table(text: str) -> dict[str, Any]:
    """What stands in a table; raises UsageError."""
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise UsageError(f"It is not TOML: {shorten(TOML_PLACE.sub('', str(error)))}.") from error


def from_csv(lines: Iterator[Line]) -> Iterator[JobSpec]:
    """A record each, whose fields the first one names; raises DataError where that names what is none."""
    records = csv_records(lines)
    head, names = next(((line, cells) for line, cells in records if line.problem or any(cells)), (None, []))
    if head is None:
        return
    wrong = [name for name in names if name not in FIELDS]
    if head.problem or wrong or len(set(names)) < len(names):
        what = head.problem or (_wrong_field(wrong[0]) if wrong else "It names a field twice.")
        raise DataError(f"The head of the table, line {head.number}, is wrong.", what)
    for line, cells in records:
        if line.problem or any(cells):
            yield parse_job(line, lambda _, cells=cells: csv_values(names, cells))


def _wrong_field(name: str) -> str:
    hint = " Separate the columns by commas." if SEPARATORS.search(name) else ""
    return f"There is no field {quote(name)}.{hint}"


def csv_values(names: list[str], cells: list[str]) -> dict[str, Any]:
    """The cells that are not empty, by name; raises UsageError for more cells than names."""
    if len(cells) > len(names):
        raise UsageError(f"It has {len(cells)} cells, and the head of the table {len(names)}.")
    return {name: cell for name, cell in zip(names, cells, strict=False) if cell}


def csv_records(lines: Iterator[Line]) -> Iterator[tuple[Line, list[str]]]:
    """The line on which each record begins, and its cells. A quote that nobody closes spoils its own line only."""
    waiting: deque[Line] = deque()
    while True:
        taken: list[Line] = []
        try:
            cells = next(csv.reader(_taking(taken, waiting, lines), strict=True), None)
        except (csv.Error, UsageError) as error:
            waiting.extendleft(reversed(taken[1:]))
            yield Line(taken[0].number, "", taken[0].problem or f"It is not CSV: {shorten(str(error))}."), []
            continue
        if cells is None:
            return
        yield taken[0], [cell.strip() for cell in cells]


def _taking(taken: list[Line], waiting: deque[Line], lines: Iterator[Line]) -> Iterator[str]:
    """The text of line after line, all of which `taken` gets; raises UsageError where a record cannot go on."""
    length = 0
    while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
        taken.append(line)
        length += len(line.text)
        if line.problem or length > MAX_JOB_BYTES:
            raise UsageError("a quote is not closed")
        yield line.text + "\n"


READERS: dict[Format, Callable[[Iterator[Line]], Iterator[JobSpec]]] = {
    "JSONL": from_json,
    "CSV": from_csv,
    "TOML": from_toml,
    "text": from_text,
}
