"""What a forked process does: take its place (folder, streams, limits, user, faults), then run the program."""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from tests.faults.harness import calls

LIMITS = {"file": resource.RLIMIT_FSIZE}


def run(wanted: dict[str, Any]) -> None:
    """Run `linfusion ARGUMENTS` as a shell would have started it, and end as it ends.

    `wanted`: arguments; folder (to work in); log (the folder of stdout, stderr and what the tests note); and, where
    they are not null, limits (bytes), user (its number), fault (see calls.py), modules (a file to name them in).
    """
    os.chdir(wanted["folder"])
    log = Path(wanted["log"])
    take_streams(log)
    note = with_time(notes(log / "events"))
    tell_events(note)
    for name, number in (wanted.get("limits") or {}).items():
        resource.setrlimit(LIMITS[name], (number, number))
    if wanted.get("ignored"):
        signal.signal(wanted["ignored"], signal.SIG_IGN)
    calls.arm(calls.Fault(**wanted.get("fault") or {}), Path.cwd(), notes(log / "calls"))
    if wanted.get("user"):
        os.setgroups([])
        os.setgid(wanted["user"])
        os.setuid(wanted["user"])
    sys.argv = ["linfusion", *wanted["arguments"]]
    from linfusion_cli.cli import app

    try:
        app.main()
    finally:
        note("end")
        if wanted.get("modules"):
            Path(wanted["modules"]).write_text(json.dumps(list(sys.modules)))


def take_streams(log: Path) -> None:
    """Standard input is empty; the others are files, of which a terminal is nothing."""
    opened = [
        os.open(os.devnull, os.O_RDONLY),
        *[os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666) for name in ("stdout", "stderr")],
    ]
    for number, fd in enumerate(opened):
        os.dup2(fd, number)
        os.close(fd)


def notes(path: Path) -> Callable[[str], None]:
    """Takes lines for a file, each written at once: the next call may be the process's last."""
    fd, write = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666), os.write
    return lambda text: write(fd, f"{text}\n".encode()) and None


def with_time(note: Callable[[str], None]) -> Callable[[str], None]:
    """The same, with the time, which is that of all processes, before each line."""
    return lambda text: note(f"{time.monotonic():.6f} {text}")


def tell_events(note: Callable[[str], None]) -> None:
    """Note the events of the run: which stage begins, how far it is, and where it ends."""
    from linfusion_cli.core.events import Event, Observer, StageAdvanced, StageFinished, StageStarted
    from linfusion_cli.run.progress.recorder import RunRecorder

    begin = RunRecorder.__init__

    @wraps(begin)
    def begin_noting(self: RunRecorder, observer: Observer) -> None:
        begin(self, observer)

        def both(event: Event) -> None:
            match event:
                case StageStarted(name=name, size=size, unit=unit):
                    note(f"begin {name} {size} {unit}")
                case StageAdvanced(done=done):
                    note(f"done {done}")
                case StageFinished():
                    note("finish")
            observer(event)

        self._observer = both

    RunRecorder.__init__ = begin_noting
