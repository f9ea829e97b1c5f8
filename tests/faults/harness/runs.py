"""Runs of the program as processes of their own, begun by the fork server or in the usual way."""

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
LONGEST_SEC = 120.0  # a run that takes this long hangs


@dataclass
class Run:
    """A process that runs the program in `folder`; what it says and does is noted in files in `log`."""

    pid: int
    folder: Path
    log: Path
    server: "Server | None" = None
    began: float = field(default_factory=time.monotonic)
    code: int | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._handle = os.pidfd_open(self.pid)

    def send(self, number: int) -> None:
        """A signal, to this process and to no other that may have its number by now."""
        if self.code is None:
            signal.pidfd_send_signal(self._handle, number)

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether it has ended, or does within so many seconds."""
        return self.code is not None or bool(select.select([self._handle], [], [], max(0.0, seconds))[0])

    def wait(self, seconds: float = LONGEST_SEC) -> int:
        """Its exit code as a shell sees it, 128 + N where signal N killed it."""
        if self.code is None:
            if not self.ended(seconds):
                self.send(signal.SIGKILL)
                raise AssertionError(f"after {seconds} s the run goes on: {self.events()[-1:]}, {self.stderr()}")
            self.seconds = time.monotonic() - self.began
            status = self.server.reap(self.pid) if self.server else os.waitpid(self.pid, 0)[1]
            code = os.waitstatus_to_exitcode(status)
            self.code = 128 - code if code < 0 else code
            os.close(self._handle)
        return self.code

    def kill(self) -> bool:
        """SIGKILL; whether it came before the end."""
        self.send(signal.SIGKILL)
        return self.wait() == 128 + signal.SIGKILL

    def stderr(self) -> str:
        return (self.log / "stderr").read_text(errors="replace")

    def events(self) -> list[str]:
        """What has happened: begin STAGE SIZE UNIT, done NUMBER, finish, end."""
        return [line.split(" ", 1)[1] for line in lines(self.log / "events")]

    def timeline(self) -> list[float]:
        """When, in seconds since it began."""
        return [float(line.split(" ", 1)[0]) - self.began for line in lines(self.log / "events")]

    def reaches(self, seconds: float, timeline: Sequence[float]) -> bool:
        """Wait until it has come as far as the run with this timeline had after so many seconds; False if it ends.

        By what has happened, and not by the clock: the machine may have other things to do.
        """
        before = [moment for moment in timeline if moment <= seconds]
        while len(lines(self.log / "events")) < len(before):
            if self.ended(POLL_SEC):
                return False
        return not self.ended(seconds - (before[-1] if before else 0.0))

    def calls(self) -> list[str]:
        """Calls that changed files in the folder, as NUMBER NAME FILE."""
        return lines(self.log / "calls")

    def stages(self) -> list[str]:
        """The stages that began, in their order."""
        return [event.split()[1] for event in self.events() if event.startswith("begin ")]

    def steps(self) -> list[tuple[str, int]]:
        """The steps that were finished, as (stage, number)."""
        found, stage, unit = [], "", ""
        for event, *words in map(str.split, self.events()):
            if event == "begin":
                stage, unit = words[0], words[-1]
            elif event == "done" and unit == "steps":
                found.append((stage, int(words[0])))
        return found

    def place(self) -> str:
        """Where it was when it ended: in which stage, or after which."""
        events = [event for event in self.events() if event != "end"]
        if not events:
            return "starting"
        return f"after {self.stages()[-1]}" if events[-1] == "finish" else self.stages()[-1]


def lines(path: Path) -> list[str]:
    """The whole lines of a file that may be written just now, or not be there yet."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


class Server:
    """The fork server, and its runs that have not ended: leaving the context ends them all."""

    def __init__(self, folder: Path):
        self._logs, self._numbers, self._running = folder / "logs", count(1), {}
        self._one_asks = Lock()
        self._logs.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.harness.server"],
            cwd=ROOT,
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, arguments: Sequence[str], folder: Path, fault: Fault | None = None, **more: Any) -> Run:
        """A forked run; `more` are limits, ignored, user and modules, see child.py."""
        log = self.new_log()
        wanted = {"arguments": list(arguments), "folder": str(folder), "log": str(log), **more}
        if fault:
            wanted["fault"] = vars(fault)
        run = Run(self._ask("run", wanted), folder, log, self)
        self._running[run.pid] = run
        return run

    def run(self, arguments: Sequence[str], folder: Path, fault: Fault | None = None, **more: Any) -> Run:
        """One that has ended."""
        run = self.start(arguments, folder, fault, **more)
        run.wait()
        return run

    def warm_up(self, arguments: Sequence[str], folder: Path) -> None:
        """Let the server import whatever such a run does: those to come need not."""
        names = folder / "modules"
        assert self.run(arguments, folder, modules=str(names)).code == 0
        self._ask("preload", json.loads(names.read_text()))

    def new_log(self) -> Path:
        log = self._logs / f"{next(self._numbers):05}"
        log.mkdir()
        return log

    def reap(self, pid: int) -> int:
        """The wait status of a run that has ended, or is about to."""
        del self._running[pid]
        return self._ask("wait", pid)

    def _ask(self, kind: str, value: Any) -> int:
        with self._one_asks:
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


def environment(folder: Path) -> Mapping[str, str]:
    """One thread (a process that forks has one), no settings, no caches, and logs of bugs in `folder`."""
    own = {name: text for name, text in os.environ.items() if not name.startswith(("LINFUSION_", "SLURM_"))}
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    places = {"XDG_CONFIG_HOME": folder / "config", "HF_HOME": folder / "hub", "TMPDIR": folder}
    offline = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    return own | threads | offline | {name: str(path) for name, path in places.items()}


def truly_started(arguments: Sequence[str], folder: Path, log: Path) -> Run:
    """A run as a shell starts it, with its imports."""
    with (log / "stdout").open("wb") as out, (log / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "linfusion_cli", *arguments],
            cwd=folder,
            env=environment(log),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
    return Run(process.pid, folder, log)
