"""Faults at a numbered call of the operating system: the process is killed there, or the call fails, or is slow.

Only calls that change files in one folder are counted, so a run makes the same ones in the same order each time.
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
SLOW_SEC = 30.0


@dataclass(frozen=True)
class Fault:
    """What befalls the `at`-th call (from 1; 0 is none) of those named in `calls`, and with `onwards` all after it.

    `effect` is kill (before the call), tear (half of what is to be written is, then kill), fail (with the error named
    `error`), or wait.
    """

    calls: tuple[str, ...] = ALL
    at: int = 0
    effect: str = "kill"
    error: str = "EIO"
    onwards: bool = False

    def befalls(self, number: int) -> bool:
        return number == self.at or (self.onwards and 0 < self.at < number)


def arm(fault: Fault, folder: Path, note: Callable[[str], None]) -> None:
    """From now on calls in `folder` are counted and noted as `NUMBER NAME FILE`, and the fault waits."""
    watch = Watch(fault, str(folder), note)
    for name in ALL:
        setattr(os, name, watch.around(name, getattr(os, name)))
    opened = watch.opening(io.open)
    io.open = builtins.open = opened


class Watch:
    def __init__(self, fault: Fault, folder: str, note: Callable[[str], None]):
        self._fault, self._folder, self._note = fault, folder, note
        self._numbers = count(1)
        self._kill, self._link = os.kill, os.readlink

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, as os has it, under this watch."""

        @wraps(call)
        def watched(*arguments: Any, **named: Any) -> Any:
            if changes(name, arguments) and (path := self._path(arguments[0], named.get("dir_fd"))):
                self.meet(name, path, lambda part: call(arguments[0], part, *arguments[2:]), arguments)
            return call(*arguments, **named)

        return watched

    def opening(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The built-in open: files for writing bytes are of a kind whose writes are watched."""

        @wraps(call)
        def watched(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
            path = "" if isinstance(file, int) else self._path(file, None)
            if not path or mode not in ("wb", "xb", "ab"):
                return call(file, mode, buffering, *rest, **named)
            self.meet("open", path)
            raw = WatchedFile(path, mode, self)
            return raw if buffering == 0 else io.BufferedWriter(raw)

        return watched

    def meet(
        self, name: str, path: str, write: Callable[[Any], Any] | None = None, arguments: tuple[Any, ...] = ()
    ) -> None:
        """Count this call and let the fault have it, if it is the one."""
        if name not in self._fault.calls:
            return
        number = next(self._numbers)
        self._note(f"{number} {name} {path[len(self._folder) + 1 :]}")
        if self._fault.befalls(number):
            self._strike(name, path, write, arguments)

    def _strike(self, name: str, path: str, write: Callable[[Any], Any] | None, arguments: tuple[Any, ...]) -> None:
        match self._fault.effect:
            case "wait":
                time.sleep(SLOW_SEC)
            case "fail":
                number = getattr(errno, self._fault.error)
                raise OSError(number, os.strerror(number), path)
            case "tear" if name in WRITES:
                data = memoryview(arguments[1]).cast("B")
                write(data[: len(data) // 2])
        if self._fault.effect in ("kill", "tear"):
            self._kill(os.getpid(), signal.SIGKILL)

    def _path(self, file: Any, folder: int | None) -> str:
        """The path of a file or descriptor in the watched folder; empty for all others."""
        if isinstance(file, int):
            path = self._link(f"/proc/self/fd/{file}").removesuffix(" (deleted)")
        else:
            base = Path.cwd() if folder is None else self._link(f"/proc/self/fd/{folder}")
            path = os.path.normpath(Path(base, os.fsdecode(file)))
        return path if path == self._folder or path.startswith(self._folder + "/") else ""


class WatchedFile(io.FileIO):
    """A file whose writes are met by the watch."""

    def __init__(self, path: str, mode: str, watch: Watch):
        super().__init__(path, mode)
        self._path, self._watch = path, watch

    def write(self, data: Any) -> int:
        self._watch.meet("write", self._path, super().write, (self._path, data))
        return super().write(data)


def changes(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a call changes files: reading ones are not counted."""
    return name != "open" or bool(arguments[1] & os.O_CREAT)
