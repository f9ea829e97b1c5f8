"""What came of the jobs of a batch: a line for each, on the disk before the next begins."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from linfusion_cli.core.errors import CannotCreateOutput, TemporaryFailure, WriteFailed

EXIT_SOME_FAILED = 3
BLOCK = 4096

Status = Literal["done", "skipped", "failed", "held", "planned"]


@dataclass(frozen=True)
class JobResult:
    """What came of a job. `held` is one whose file another run was making, `planned` one of a dry run.

    `list` is the name of the list that it is from, `line` its line there; `time` when it was over.
    """

    list: str
    index: int
    line: int
    status: Status
    exit_code: int
    error: str | None
    output: str | None
    seconds: float
    peak_host_bytes: int | None
    peak_device_bytes: int | None
    prompt: str | None
    seed: int | None
    time: str


class ResultsLog:
    """The file of outcomes, a JSON object a line, to which every run appends. A line is whole or is not there."""

    def __init__(self, path: Path):
        """Opens it, without what a run that was killed may have left of a line; raises CannotCreate."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CannotCreateOutput(
                f"{path} cannot be written ({error.strerror}).", "Name another --output-dir."
            ) from error
        self._lock()
        _drop_half_line(self._fd)
        self._unlock()

    def append(self, outcome: JobResult) -> None:
        """Add a line, which is on the disk when this returns; raises WriteFailed, with no part of it left."""
        line = json.dumps(asdict(outcome), ensure_ascii=False) + "\n"
        data = line.encode("utf-8", "backslashreplace")  # of a name that is no text, JSON has the same escapes
        self._lock()
        try:
            if os.write(self._fd, data) < len(data):
                raise WriteFailed(f"There is no room for a line in {self.path}.", "Free some space.")
            os.fsync(self._fd)
        except OSError as error:
            raise WriteFailed(f"{self.path} cannot be written ({error.strerror}).", "Check the disk.") from error
        finally:
            with suppress(OSError):
                _drop_half_line(self._fd)
            self._unlock()

    def close(self) -> None:
        os.close(self._fd)

    def _lock(self) -> None:
        """Nobody else appends now, or takes what is being written for half a line; some file systems have no locks."""
        with suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def _unlock(self) -> None:
        with suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_UN)


def _drop_half_line(fd: int) -> None:
    """Cut the file after its last line's end."""
    end = size = os.fstat(fd).st_size
    while end:
        start = max(0, end - BLOCK)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)


@dataclass
class Summary:
    """How many jobs came to what."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    held: int = 0
    planned: int = 0

    def count(self, outcome: JobResult) -> None:
        setattr(self, outcome.status, getattr(self, outcome.status) + 1)

    @property
    def exit_code(self) -> int:
        """0 if all are complete, 75 if the others are being made by another run, 3 if some failed."""
        if self.failed:
            return EXIT_SOME_FAILED
        return TemporaryFailure.exit_code if self.held else 0
