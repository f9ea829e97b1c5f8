"""Runs of the program in separate processes, started by the fork server or by a shell."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, Self

from tests.faults.harness.calls import Fault

ROOT = Path(__file__).parents[3]
CANNOT_CREATE, NOT_WRITTEN, TRY_AGAIN = 73, 74, 75
POLL_SEC = 0.003
MAX_RUN_SEC = 120.0  # a run that takes longer hangs


@dataclass
class Run:
    """A process that runs the program in `folder`; its output and events are recorded in files in `log`."""

    pid: int
    folder: Path
    log: Path
    server: "Server | None" = None
    started: float = field(default_factory=time.monotonic)
    code: int | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._handle = os.pidfd_open(self.pid)

    def send(self, number: int) -> None:
        """Send a signal to this process, never to another one that has got the same pid."""
        if self.code is None:
            signal.pidfd_send_signal(self._handle, number)

    def has_ended(self, seconds: float = 0.0) -> bool:
        """Return whether the process has ended, or ends within `seconds`."""
        return self.code is not None or bool(select.select([self._handle], [], [], max(0.0, seconds))[0])

    def wait(self, seconds: float = MAX_RUN_SEC) -> int:
        """Wait for the process and return its exit code, 128 + N if signal N killed it."""
        if self.code is None:
            if not self.has_ended(seconds):
                self.send(signal.SIGKILL)
                raise AssertionError(
                    f"the run has not ended after {seconds} s: {self.read_events()[-1:]}, {self.read_stderr()}"
                )
            self.seconds = time.monotonic() - self.started
            status = self.server.reap(self.pid) if self.server else os.waitpid(self.pid, 0)[1]
            code = os.waitstatus_to_exitcode(status)
            self.code = 128 - code if code < 0 else code
            os.close(self._handle)
        return self.code

    def kill(self) -> bool:
        """Send SIGKILL and return whether the process was still running."""
        self.send(signal.SIGKILL)
        return self.wait() == 128 + signal.SIGKILL

    def read_stderr(self) -> str:
        return (self.log / "stderr").read_text(errors="replace")

    def read_events(self) -> list[str]:
        """Return the recorded events: begin STAGE SIZE UNIT, done NUMBER, finish, end."""
        return [line.split(" ", 1)[1] for line in read_lines(self.log / "events")]

    def read_timeline(self) -> list[float]:
        """Return the times of the events, in seconds since the start."""
        return [float(line.split(" ", 1)[0]) - self.started for line in read_lines(self.log / "events")]

    def wait_for_progress(self, seconds: float, timeline: Sequence[float]) -> bool:
        """Wait until this run is as far as the run with this timeline was after `seconds`; False if it ends before.

        The progress is measured by events, not by the clock: the machine can be busy.
        """
        before = [moment for moment in timeline if moment <= seconds]
        while len(read_lines(self.log / "events")) < len(before):
            if self.has_ended(POLL_SEC):
                return False
        return not self.has_ended(seconds - (before[-1] if before else 0.0))

    def read_calls(self) -> list[str]:
        """Return the calls that changed files in the folder, as NUMBER NAME FILE."""
        return read_lines(self.log / "calls")

    def list_stages(self) -> list[str]:
        """Return the started stages in order."""
        return [event.split()[1] for event in self.read_events() if event.startswith("begin ")]

    def list_steps(self) -> list[tuple[str, int]]:
        """Return the finished steps as (stage, number)."""
        steps, stage, unit = [], "", ""
        for event, *words in map(str.split, self.read_events()):
            if event == "begin":
                stage, unit = words[0], words[-1]
            elif event == "done" and unit == "steps":
                steps.append((stage, int(words[0])))
        return steps

    def find_last_stage(self) -> str:
        """Return the stage in which the run ended, or "after" the last finished one."""
        events = [event for event in self.read_events() if event != "end"]
        if not events:
            return "starting"
        return f"after {self.list_stages()[-1]}" if events[-1] == "finish" else self.list_stages()[-1]


def read_lines(path: Path) -> list[str]:
    """Return the complete lines of a file; empty if it does not exist yet."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


class Server:
    """The fork server and its running processes; leaving the context kills them."""

    def __init__(self, folder: Path):
        self._logs, self._numbers, self._running = folder / "logs", count(1), {}
        self._request_lock = Lock()
        self._logs.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.harness.server"],
            cwd=ROOT,
            env=build_environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, arguments: Sequence[str], folder: Path, fault: Fault | None = None, **more: Any) -> Run:
        """Fork a run; `more` are limits, ignored, user and modules, see child.py."""
        log = self.create_log_folder()
        spec = {"arguments": list(arguments), "folder": str(folder), "log": str(log), **more}
        if fault:
            spec["fault"] = vars(fault)
        run = Run(self._request("run", spec), folder, log, self)
        self._running[run.pid] = run
        return run

    def run(self, arguments: Sequence[str], folder: Path, fault: Fault | None = None, **more: Any) -> Run:
        """Fork a run and wait until it has ended."""
        run = self.start(arguments, folder, fault, **more)
        run.wait()
        return run

    def warm_up(self, arguments: Sequence[str], folder: Path) -> None:
        """Make the server import all modules that such a run imports, for faster runs later."""
        names = folder / "modules"
        assert self.run(arguments, folder, modules=str(names)).code == 0
        self._request("preload", json.loads(names.read_text()))

    def create_log_folder(self) -> Path:
        log = self._logs / f"{next(self._numbers):05}"
        log.mkdir()
        return log

    def reap(self, pid: int) -> int:
        """Wait for a run and return its wait status."""
        del self._running[pid]
        return self._request("wait", pid)

    def _request(self, kind: str, value: Any) -> int:
        with self._request_lock:
            self._process.stdin.write(json.dumps({kind: value}).encode() + b"\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for run in list(self._running.values()):
            run.kill()
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def build_environment(folder: Path) -> Mapping[str, str]:
    """Return an environment with one thread (required for forks) and without settings and caches.

    Crash logs are written to `folder`.
    """
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(("LINFUSION_", "SLURM_"))}
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    folders = {"XDG_CONFIG_HOME": folder / "config", "HF_HOME": folder / "hub", "TMPDIR": folder}
    offline = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    return inherited | threads | offline | {name: str(path) for name, path in folders.items()}


def start_process(arguments: Sequence[str], folder: Path, log: Path) -> Run:
    """Start a run as a shell does, including its imports."""
    with (log / "stdout").open("wb") as out, (log / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "linfusion_cli", *arguments],
            cwd=folder,
            env=build_environment(log),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
    return Run(process.pid, folder, log)
