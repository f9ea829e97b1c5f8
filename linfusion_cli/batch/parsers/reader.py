"""Open a job list and read its jobs in the format of the list."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from linfusion_cli.batch.parsers.csv import read_csv
from linfusion_cli.batch.parsers.job_spec import JobSpec
from linfusion_cli.batch.parsers.jsonl import read_jsonl
from linfusion_cli.batch.parsers.line_reader import Line, read_lines
from linfusion_cli.batch.parsers.list_format import Format, check_suffix, detect_format
from linfusion_cli.batch.parsers.text import read_text
from linfusion_cli.batch.parsers.toml import read_toml
from linfusion_cli.core.errors import DataError, InputNotFound, first_line
from linfusion_cli.core.fs import expand_home

STDIN = "-"
READERS: dict[Format, Callable[[Iterator[Line]], Iterator[JobSpec]]] = {
    "JSONL": read_jsonl,
    "CSV": read_csv,
    "TOML": read_toml,
    "text": read_text,
}
EMPTY_HINTS: dict[Format, str] = {  # for a list without jobs
    "JSONL": 'Write one object per line: {"prompt": "a hill"}',
    "CSV": "Write one job per line below the names of the columns.",
    "TOML": "Start each job with a line [[job]].",
    "text": "Write one prompt per line; lines that start with # are comments.",
}


def read_list(source: str) -> Iterator[JobSpec]:
    """Yield the jobs of a file, of a pipe, or, for `-`, of standard input.

    The suffix of a file determines the format; without one, and for pipes, the first lines do. Raises InputNotFound,
    or DataError if the source is not a list or has no jobs.
    """
    path = None if source == STDIN else expand_home(source)
    name = "Standard input" if path is None else f"The list {path}"
    with _get_stdin() if path is None else _open_file(path) as file:
        try:
            if path is not None and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                check_suffix(path)
            yield from _read_jobs("" if path is None else path.suffix, file, name)
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise DataError(f"{name} cannot be read ({reason}).", "Check the file or device.") from error


def _read_jobs(suffix: str, file: BinaryIO, name: str) -> Iterator[JobSpec]:
    list_format, lines = detect_format(suffix, read_lines(file, name), name)
    jobs = READERS[list_format](lines)
    first = next(jobs, None)
    if first is None:
        raise DataError(f"{name} has no jobs.", EMPTY_HINTS[list_format])
    yield from chain([first], jobs)


def _open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder.", "Use a job list, or --watch.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputNotFound(f"The job list {path} cannot be read ({reason}).", "Check the path.") from error


def _get_stdin() -> AbstractContextManager[BinaryIO]:
    """Return standard input, which stays open; an empty file if it is closed."""
    if sys.stdin is None or sys.stdin.closed:
        return nullcontext(io.BytesIO())
    return nullcontext(sys.stdin.buffer)
