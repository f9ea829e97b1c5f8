"""Write to stdout and stderr: results, messages and log lines.

Standard output carries results only. Everything else goes to stderr, including what libraries print to stdout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import typer

from linfusion_cli.cli.output.log_file import escape_line, format_timestamp, write_log
from linfusion_cli.core.errors import WriteFailed

DEFAULT_WIDTH = 80  # of terminals that do not report one


def is_terminal() -> bool:
    """Return whether stderr is a terminal; False if it is closed, as in some services."""
    return sys.stderr is not None and sys.stderr.isatty()


def can_move_cursor() -> bool:
    """Return whether stderr is a terminal that can draw a line again."""
    return is_terminal() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def measure_width(stream: TextIO) -> int | None:
    """Return the columns of the terminal that a stream writes to; None if it is no terminal, for text of any width.

    COLUMNS precedes the width that the terminal reports, as in other programs.
    """
    if stream is None or not stream.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    with suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_WIDTH
    return DEFAULT_WIDTH


def echo(text: str) -> None:
    """Write text to stderr without markup or wrapping. A closed pipe or a full disk must not stop the run."""
    try:
        typer.echo(text, err=True)
    except OSError:
        with suppress(OSError):
            redirect_to_devnull(sys.stderr)


def echo_line(text: str) -> None:
    """Write one line to stderr, with control characters escaped, and with a timestamp unless stderr is a terminal."""
    line = escape_line(text)
    echo(line if is_terminal() else f"{format_timestamp()} {line}")


def log(text: str) -> None:
    """Write one line to stderr and to the log file."""
    echo_line(text)
    write_log(text)


def redirect_to_devnull(stream: TextIO) -> None:
    """Discard the buffer and all later output of `stream`: otherwise its flush at exit fails with exit code 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _ResultStream:
    """The stream of the original stdout while `redirect_library_output` is active."""

    stream: TextIO | None = None


def emit_result(text: str) -> None:
    """Write a result to stdout. Raise WriteFailed if the disk is full, but not if the reader has exited (`| head`)."""
    stream = _ResultStream.stream or sys.stdout
    try:
        typer.echo(text, file=stream)
    except OSError as error:
        redirect_to_devnull(stream)
        if not isinstance(error, BrokenPipeError):
            raise WriteFailed(f"Cannot write to standard output ({error.strerror}): {text}") from error


@contextmanager
def redirect_library_output() -> Iterator[None]:
    """Send to stderr what libraries write to stdout, also from C; `emit_result` still writes to stdout."""
    stdout, stderr = _find_descriptor(sys.stdout), _find_descriptor(sys.stderr)
    if stdout is None or _ResultStream.stream is not None:
        yield
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(stdout), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors) as stream:
        _replace_descriptor(stdout, os.open(os.devnull, os.O_WRONLY) if stderr is None else os.dup(stderr))
        _ResultStream.stream = stream
        try:
            yield
        finally:
            _ResultStream.stream = None
            with suppress(OSError):
                sys.stdout.flush()
            _replace_descriptor(stdout, os.dup(stream.fileno()))


def _replace_descriptor(descriptor: int, target: int) -> None:
    """Make `descriptor` a duplicate of `target`, and close `target`."""
    os.dup2(target, descriptor)
    os.close(target)


def _find_descriptor(stream: TextIO | None) -> int | None:
    """Return the file descriptor of a stream, or None if it is closed or in memory."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None
