"""Log the result of each job as a line of a file, synced before the next job starts."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from linfusion_cli.core.errors import CannotCreateOutput, TemporaryFailure, WriteFailed

EXIT_SOME_FAILED = 3
BLOCK_BYTES = 4096
SCHEMA = 1  # of the JSON of a result

Status = Literal["done", "skipped", "failed", "locked", "planned"]


@dataclass(frozen=True)
class JobResult:
    """The result of a job.

    status: `locked` if another run is writing the file, `planned` in a dry run.
    list, line: the name of the list, and the line of the job.
    time: when the job ended.
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

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values, with the schema number first."""
        return {"schema": SCHEMA} | asdict(self)


class ResultsLog:
    """The results file, to which every run appends: one JSON object per line, never a partial line."""

    def __init__(self, path: Path):
        """Open the file, and remove the partial line of a killed run; raise CannotCreateOutput."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CannotCreateOutput(
                f"{path} cannot be written ({error.strerror}).", "Choose another --output-dir."
            ) from error
        self._lock()
        _truncate_partial_line(self._fd)
        self._unlock()

    def append(self, result: JobResult) -> None:
        """Append a line and sync it; raise WriteFailed without leaving a partial line."""
        line = json.dumps(result.to_json(), ensure_ascii=False) + "\n"
        data = line.encode("utf-8", "backslashreplace")  # invalid Unicode in names: JSON has the same escapes
        self._lock()
        try:
            if os.write(self._fd, data) < len(data):
                raise WriteFailed(f"There is no space for a line in {self.path}.", "Free some space.")
            os.fsync(self._fd)
        except OSError as error:
            raise WriteFailed(f"{self.path} cannot be written ({error.strerror}).", "Check the disk.") from error
        finally:
            with suppress(OSError):
                _truncate_partial_line(self._fd)
            self._unlock()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _lock(self) -> None:
        """Exclude other runs: they would take an unfinished line for a partial one. Some file systems have no locks."""
        with suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def _unlock(self) -> None:
        with suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_UN)


def _truncate_partial_line(fd: int) -> None:
    """Truncate the file after its last newline."""
    end = size = os.fstat(fd).st_size
    while end:
        start = max(0, end - BLOCK_BYTES)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)


@dataclass
class Summary:
    """The number of jobs by status."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    locked: int = 0
    planned: int = 0

    def add(self, result: JobResult) -> None:
        """Count `result`."""
        setattr(self, result.status, getattr(self, result.status) + 1)

    @property
    def exit_code(self) -> int:
        """0 if all jobs are complete, 75 if another run is writing the remaining ones, 3 if some failed."""
        if self.failed:
            return EXIT_SOME_FAILED
        return TemporaryFailure.exit_code if self.locked else 0
