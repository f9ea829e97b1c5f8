"""Faults at a numbered system call: the process is killed, or the call fails or blocks.

Only calls that change files in one folder are counted. They are the same, in the same order, in every run.
"""

import builtins
import errno
import io
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import count
from pathlib import Path
from typing import Any

WRITES = ("write", "pwrite")
SYNCS = ("fsync", "fdatasync")
NAMES = ("rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir")
ALL = (*WRITES, *SYNCS, *NAMES, "open", "ftruncate")
WAIT_SEC = 30.0


@dataclass(frozen=True)
class Fault:
    """A fault of the `at`-th of the named `calls` (from 1; 0: no fault), and with `onwards` of all later ones.

    `effect` is kill (before the call), tear (write half of the data, then kill), fail (with the error named `error`),
    or wait.
    """

    calls: tuple[str, ...] = ALL
    at: int = 0
    effect: str = "kill"
    error: str = "EIO"
    onwards: bool = False

    def applies_to(self, number: int) -> bool:
        """Return whether the call with this number has the fault."""
        return number == self.at or (self.onwards and 0 < self.at < number)


def install_fault(fault: Fault, folder: Path, record: Callable[[str], None]) -> None:
    """Count the calls in `folder`, record them as `NUMBER NAME FILE`, and apply the fault to its call."""
    watcher = CallWatcher(fault, str(folder), record)
    for name in ALL:
        setattr(os, name, watcher.wrap_call(name, getattr(os, name)))
    io.open = builtins.open = watcher.wrap_open(io.open)


class CallWatcher:
    """Wraps the functions of os that change files."""

    def __init__(self, fault: Fault, folder: str, record: Callable[[str], None]):
        self._fault, self._folder, self._record = fault, folder, record
        self._numbers = count(1)
        self._kill, self._link = os.kill, os.readlink

    def wrap_call(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of os with counting."""

        @wraps(call)
        def watched(*arguments: Any, **named: Any) -> Any:
            if changes_files(name, arguments) and (path := self._path(arguments[0], named.get("dir_fd"))):
                self.count_call(name, path, lambda part: call(arguments[0], part, *arguments[2:]), arguments)
            return call(*arguments, **named)

        return watched

    def wrap_open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the built-in open with counting; files for writing bytes are WatchedFiles."""

        @wraps(call)
        def watched(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
            path = "" if isinstance(file, int) else self._path(file, None)
            if not path or mode not in ("wb", "xb", "ab"):
                return call(file, mode, buffering, *rest, **named)
            self.count_call("open", path)
            raw = WatchedFile(path, mode, self)
            return raw if buffering == 0 else io.BufferedWriter(raw)

        return watched

    def count_call(
        self, name: str, path: str, write: Callable[[Any], Any] | None = None, arguments: tuple[Any, ...] = ()
    ) -> None:
        """Count and record a call, and apply the fault if it is for this call."""
        if name not in self._fault.calls:
            return
        number = next(self._numbers)
        self._record(f"{number} {name} {path[len(self._folder) + 1 :]}")
        if self._fault.applies_to(number):
            self._apply_fault(name, path, write, arguments)

    def _apply_fault(
        self, name: str, path: str, write: Callable[[Any], Any] | None, arguments: tuple[Any, ...]
    ) -> None:
        match self._fault.effect:
            case "wait":
                time.sleep(WAIT_SEC)
            case "fail":
                number = getattr(errno, self._fault.error)
                raise OSError(number, os.strerror(number), path)
            case "tear" if name in WRITES:
                data = memoryview(arguments[1]).cast("B")
                write(data[: len(data) // 2])
        if self._fault.effect in ("kill", "tear"):
            self._kill(os.getpid(), signal.SIGKILL)

    def _path(self, file: Any, folder: int | None) -> str:
        """Return the path of a file or descriptor in the watched folder, or an empty string for all others."""
        if isinstance(file, int):
            path = self._link(f"/proc/self/fd/{file}").removesuffix(" (deleted)")
        else:
            base = Path.cwd() if folder is None else self._link(f"/proc/self/fd/{folder}")
            path = os.path.normpath(Path(base, os.fsdecode(file)))
        return path if path == self._folder or path.startswith(self._folder + "/") else ""


class WatchedFile(io.FileIO):
    """A file that counts its writes."""

    def __init__(self, path: str, mode: str, watcher: CallWatcher):
        super().__init__(path, mode)
        self._path, self._watcher = path, watcher

    def write(self, data: Any) -> int:
        self._watcher.count_call("write", self._path, super().write, (self._path, data))
        return super().write(data)


def changes_files(name: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether a call changes files; calls that only read are not counted."""
    return name != "open" or bool(arguments[1] & os.O_CREAT)
