"""The forked process: set up folder, streams, limits, user and fault, then run the program."""

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


def run(spec: dict[str, Any]) -> None:
    """Run `linfusion ARGUMENTS` as if started by a shell.

    `spec` has arguments, folder (the working directory) and log (the folder of stdout, stderr and recorded events).
    Optional: limits (bytes), ignored (a signal), user (id), fault (see calls.py), and modules (a file to which the
    names of the imported modules are written).
    """
    os.chdir(spec["folder"])
    log = Path(spec["log"])
    redirect_streams(log)
    record = add_timestamps(open_event_file(log / "events"))
    record_events(record)
    for name, number in (spec.get("limits") or {}).items():
        resource.setrlimit(LIMITS[name], (number, number))
    if spec.get("ignored"):
        signal.signal(spec["ignored"], signal.SIG_IGN)
    calls.install_fault(calls.Fault(**spec.get("fault") or {}), Path.cwd(), open_event_file(log / "calls"))
    if spec.get("user"):
        os.setgroups([])
        os.setgid(spec["user"])
        os.setuid(spec["user"])
    sys.argv = ["linfusion", *spec["arguments"]]
    from linfusion_cli.cli import app

    try:
        app.main()
    finally:
        record("end")
        if spec.get("modules"):
            Path(spec["modules"]).write_text(json.dumps(list(sys.modules)))


def redirect_streams(log: Path) -> None:
    """Make standard input empty, and redirect stdout and stderr to files."""
    descriptors = [
        os.open(os.devnull, os.O_RDONLY),
        *[os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666) for name in ("stdout", "stderr")],
    ]
    for number, fd in enumerate(descriptors):
        os.dup2(fd, number)
        os.close(fd)


def open_event_file(path: Path) -> Callable[[str], None]:
    """Return a function that appends lines to a file without buffering: the process can be killed at any time."""
    fd, write = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666), os.write
    return lambda text: write(fd, f"{text}\n".encode()) and None


def add_timestamps(record: Callable[[str], None]) -> Callable[[str], None]:
    """Return the same function with a monotonic timestamp, valid for all processes, before each line."""
    return lambda text: record(f"{time.monotonic():.6f} {text}")


def record_events(record: Callable[[str], None]) -> None:
    """Record the events of the run: start, progress and end of each stage."""
    from linfusion_cli.core.events import Event, Observer, StageAdvanced, StageFinished, StageStarted
    from linfusion_cli.run.progress.recorder import RunRecorder

    init = RunRecorder.__init__

    @wraps(init)
    def init_recording(self: RunRecorder, observer: Observer) -> None:
        init(self, observer)

        def record_and_observe(event: Event) -> None:
            match event:
                case StageStarted(kind=kind, phase_name=phase, size=size, unit=unit):
                    record(f"begin {kind if phase is None else f'{kind}-{phase}'} {size} {unit}")
                case StageAdvanced(done=done):
                    record(f"done {done}")
                case StageFinished():
                    record("finish")
            observer(event)

        self._observer = record_and_observe

    RunRecorder.__init__ = init_recording
