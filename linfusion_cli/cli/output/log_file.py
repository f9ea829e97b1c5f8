"""The file of --log-file: every line of a run with its time, in a file that may be rotated and shared meanwhile."""

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
from linfusion_cli.core.signals import SIGNALS
from linfusion_cli.core.units import format_seconds, user_path

# A named pipe that nobody reads must not stop a run: neither at its opening nor when it is full.
OPEN_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
HEAD_BYTES = 512
# A longer line loses its middle: with its time it is under the 4096 bytes that a pipe, too, takes in one piece.
START_CHARACTERS, END_CHARACTERS = 600, 390
# Line ends, terminal commands, directions of writing; and surrogates other than those that stand for a path's bytes.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]")
ENDINGS = {0: "complete", 3: "some jobs failed", TemporaryFailure.exit_code: "not complete, run it again"} | {
    128 + number: f"stopped by {number.name}" for number in SIGNALS
}


def timestamp() -> str:
    """The present time in ISO 8601, with the offset from UTC: 2026-11-26T07:40:12+00:00."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def printable(text: str) -> str:
    """`text` as one line of moderate length: what could forge another, or command a terminal, becomes an escape."""
    return shortened(UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), shortened(text)))


def shortened(text: str) -> str:
    """`text` without its middle, if it is too long for a line."""
    if len(text) <= START_CHARACTERS + END_CHARACTERS:
        return text
    return f"{text[:START_CHARACTERS]} … {text[-END_CHARACTERS:]}"


class LogFile:
    """A file that lines are appended to; one that was moved or deleted meanwhile is begun anew under its name.

    Each line is one write at the file's end, so several runs may share a file. Raises CannotCreate if `path` cannot be
    opened; what fails later is told to `complain`, once, and the run goes on.
    """

    def __init__(self, path: Path, complain: Callable[[str], None]):
        self._path = path.absolute()
        self._complain = complain
        self._failed = self._torn = False
        try:
            check_no_image(self._path)
            self._fd = os.open(self._path, OPEN_FLAGS, 0o666)
        except OSError as error:
            raise CannotCreateOutput(f"--log-file {str(path)!r} cannot be opened: {error.strerror}.") from error

    def write(self, text: str) -> None:
        """Append `text` as one line, after the time and this process's id."""
        with self._excused():
            self._follow()
        with self._excused():
            self._append(f"{timestamp()} {os.getpid()} {printable(text)}\n".encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        with self._excused():
            os.close(self._fd)

    def _follow(self) -> None:
        """Open the file once more where what has its name is no longer what we write to."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._fd), self._path.stat()):
                return
        fd = os.open(self._path, OPEN_FLAGS, 0o666)
        self._fd, old = fd, self._fd
        os.close(old)

    def _append(self, line: bytes) -> None:
        line = b"\n" + line if self._torn else line
        written = os.write(self._fd, line)
        if written < len(line):
            self._torn = True  # what follows begins a line of its own
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False

    @contextmanager
    def _excused(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._complain(f"linfusion: --log-file {str(self._path)!r} lacks lines: {error.strerror}.")


def check_no_image(path: Path) -> None:
    """Raise CannotCreate for a file that is no text: a picture or model named by mistake would be spoilt."""
    with suppress(FileNotFoundError, PermissionError):  # a log may be one that we can write and not read
        if path.is_file() and b"\0" in path.open("rb").read(HEAD_BYTES):
            raise CannotCreateOutput(f"--log-file {str(path)!r} is no text file.", "Name another.")


class _Open:
    """The log of this process, if it has one: from when a command opens it until the process ends."""

    file: LogFile | None = None
    began_at = 0.0


def begin(path: Path | None, complain: Callable[[str], None]) -> None:
    """Log to this file from now on; raises CannotCreate."""
    if path is not None:
        _Open.file, _Open.began_at = LogFile(user_path(str(path)), complain), time.monotonic()
        write(f"begun: linfusion {__version__} on {platform.node()}")


def write(text: str) -> None:
    """One line in the log, if there is one."""
    if _Open.file is not None:
        _Open.file.write(text)


def end(exit_code: int) -> None:
    """The last line of this run: how it ended."""
    seconds = format_seconds(time.monotonic() - _Open.began_at)
    write(f"ended: {ENDINGS.get(exit_code, 'failed')}, exit code {exit_code}, after {seconds}")
    if _Open.file is not None:
        _Open.file.close()
        _Open.file = None
