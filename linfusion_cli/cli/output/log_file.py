"""The log file of --log-file: timestamped lines, in a file that can be rotated and shared by several runs."""

from __future__ import annotations

import errno
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from linfusion_cli import __version__
from linfusion_cli.core.errors import CannotCreateOutput, TemporaryFailure
from linfusion_cli.core.fs import expand_home
from linfusion_cli.core.signals import STOP_SIGNALS
from linfusion_cli.core.units import format_seconds

# O_NONBLOCK: a named pipe without a reader must not block the run, neither on opening nor when it is full.
OPEN_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
HEAD_BYTES = 512
# Longer lines are shortened in the middle. With its timestamp, a line stays below 4096 bytes, the limit up to which
# writes to a pipe are atomic.
MAX_START_LENGTH, MAX_END_LENGTH = 600, 390
# Line breaks, terminal escapes, text direction marks, and surrogates except those that represent bytes of a path.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]")
STATUS_BY_EXIT_CODE = {
    0: "complete",
    3: "some jobs failed",
    TemporaryFailure.exit_code: "not complete, run it again",
    **{128 + number: f"stopped by {number.name}" for number in STOP_SIGNALS},
}


def format_timestamp() -> str:
    """Return the current time in ISO 8601 with the UTC offset: 2026-11-26T07:40:12+00:00."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def escape_line(text: str) -> str:
    """Return text as one line of limited length; characters that break lines or control terminals are escaped."""
    return shorten_middle(escape_controls(shorten_middle(text)))


def escape_controls(text: str) -> str:
    """Return text with the characters escaped that break lines or control terminals."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shorten_middle(text: str) -> str:
    """Return the text with its middle replaced by an ellipsis if it is too long for a line."""
    if len(text) <= MAX_START_LENGTH + MAX_END_LENGTH:
        return text
    return f"{text[:MAX_START_LENGTH]} … {text[-MAX_END_LENGTH:]}"


class LogFile:
    """An append-only file; it is created again if it was moved or deleted meanwhile.

    Each line is a single write to the end of the file: several runs can share it. Raises CannotCreateOutput if
    `path` cannot be opened. Later failures do not stop the run: the first one is passed to `warn`.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self._path = path.absolute()
        self._warn = warn
        self._has_failed = self._is_line_incomplete = False
        try:
            check_is_text(self._path)
            self._fd = os.open(self._path, OPEN_FLAGS, 0o666)
        except OSError as error:
            raise CannotCreateOutput(f"--log-file {str(path)!r} cannot be opened: {error.strerror}.") from error

    def write(self, text: str) -> None:
        """Append one line with the time, the process id and `text`."""
        with self._warn_once():
            self._reopen_if_moved()
        with self._warn_once():
            line = f"{format_timestamp()} {os.getpid()} {escape_line(text)}\n"
            self._append(line.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Close the file."""
        with self._warn_once():
            os.close(self._fd)

    def _reopen_if_moved(self) -> None:
        """Open the path again if it no longer names the open file."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._fd), self._path.stat()):
                return
        fd = os.open(self._path, OPEN_FLAGS, 0o666)
        self._fd, old = fd, self._fd
        os.close(old)

    def _append(self, line: bytes) -> None:
        line = b"\n" + line if self._is_line_incomplete else line
        written = os.write(self._fd, line)
        if written < len(line):
            self._is_line_incomplete = True  # the next line must not continue this one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._is_line_incomplete = False

    @contextmanager
    def _warn_once(self) -> Iterator[None]:
        """Suppress OSErrors; warn about the first one."""
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                self._warn(f"linfusion: --log-file {str(self._path)!r} is incomplete: {error.strerror}.")


def check_is_text(path: Path) -> None:
    """Raise CannotCreateOutput for a binary file: appending to an image or model would damage it."""
    with suppress(FileNotFoundError, PermissionError):  # a log file can be writable but not readable
        if path.is_file() and b"\0" in path.open("rb").read(HEAD_BYTES):
            raise CannotCreateOutput(f"--log-file {str(path)!r} is not a text file.", "Use another file name.")


class _ProcessLog:
    """The log file of this process, or None before `open_log` and after `close_log`."""

    file: LogFile | None = None
    opened_at = 0.0


def open_log(path: Path | None, warn: Callable[[str], None]) -> None:
    """Open the log file of this process, or do nothing without a path; raises CannotCreateOutput."""
    if path is not None:
        _ProcessLog.file, _ProcessLog.opened_at = LogFile(expand_home(str(path)), warn), time.monotonic()
        write_log(f"started: linfusion {__version__} on {platform.node()}")


def write_log(text: str) -> None:
    """Append a line to the log file of this process, if it has one."""
    if _ProcessLog.file is not None:
        _ProcessLog.file.write(text)


def close_log(exit_code: int) -> None:
    """Append the last line of this run, which states how it ended, and close the log file."""
    seconds = format_seconds(time.monotonic() - _ProcessLog.opened_at)
    write_log(f"ended: {STATUS_BY_EXIT_CODE.get(exit_code, 'failed')}, exit code {exit_code}, after {seconds}")
    if _ProcessLog.file is not None:
        _ProcessLog.file.close()
        _ProcessLog.file = None
