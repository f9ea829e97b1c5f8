"""Trials: run a request with a fault, then check its files and that the same command completes it."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from tests.faults.harness.calls import Fault
from tests.faults.harness.requests import OLD, REQUESTS, Request
from tests.faults.harness.runs import CANNOT_CREATE, Run, Server, start_process

NOBODY_UID = 65534


@dataclass(frozen=True)
class ReferenceRun:
    """The results of a request without a fault: its files, the times of its events, and its calls that change files."""

    files: dict[str, bytes]
    timeline: list[float]
    calls: list[str]


@dataclass
class Lab:
    """The environment of trials: server, thread pool, tally of outcomes, and cached reference runs."""

    folder: Path
    server: Server
    pool: Executor
    tally: dict[str, Counter[str]]
    _references: dict[str, ReferenceRun] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))
    _lock: Lock = field(default_factory=Lock)

    def create_trial(self, kind: str, name: str, within: Path | None = None, as_nobody: bool = False) -> "Trial":
        """Prepare the request `name` in a new folder; `as_nobody`: run it as another user than root."""
        folder = REQUESTS[name].create_folder((within or self.folder) / f"{next(self._numbers):05}-{name}")
        user = NOBODY_UID if as_nobody and os.geteuid() == 0 else None
        if user:
            for path in (folder, *folder.iterdir()):
                os.chown(path, user, user)
        return Trial(self, kind, name, REQUESTS[name], folder, user)

    def run_reference(self, name: str) -> ReferenceRun:
        """Run a request without a fault, once, and return its results."""
        with self._lock:
            if name not in self._references:
                trial = self.create_trial("reference", name)
                run = trial.start()
                assert run.wait() == 0, run.read_stderr()
                files = {file: (trial.folder / file).read_bytes() for file in trial.request.files}
                assert trial.list_leftovers() == []
                self._references[name] = ReferenceRun(files, run.read_timeline(), run.read_calls())
            return self._references[name]

    def count(self, kind: str, outcome: str) -> None:
        """Count an outcome for the summary."""
        with self._lock:
            self.tally[kind][outcome] += 1


@dataclass
class Trial:
    """A request in its own folder."""

    lab: Lab
    kind: str
    name: str
    request: Request
    folder: Path
    user: int | None = None

    @property
    def expected(self) -> ReferenceRun:
        return self.lab.run_reference(self.name)

    @property
    def store(self) -> Path:
        image = self.request.files[0]
        return self.folder / f"{image}.linfusion"

    @property
    def has_checkpoint(self) -> bool:
        return (self.store / "checkpoint.json").exists()

    def start(self, fault: Fault | None = None, **more: Any) -> Run:
        return self.lab.server.start(self.request.arguments, self.folder, fault, user=self.user, **more)

    def wait_for_share(self, run: Run, share: float) -> bool:
        """Wait until the run is as far as the reference run after a share of its duration; False if it ends before."""
        return run.wait_for_progress(share * self.expected.timeline[-1], self.expected.timeline)

    def start_without_fork(self) -> Run:
        return start_process(self.request.arguments, self.folder, self.lab.server.create_log_folder())

    def count(self, outcome: str) -> None:
        self.lab.count(self.kind, outcome)

    def check_outputs(self) -> None:
        """Check that each output is complete or missing, or still the old file that is to be replaced."""
        for name, expected in self.expected.files.items():
            path = self.folder / name
            if path.exists() and (found := path.read_bytes()) != expected:
                assert self.request.replaces and found == OLD, f"{name}: {describe_difference(found, expected)}"

    def rerun_to_completion(self, set_aside: bool = False) -> Run:
        """Run the same command and check that all files are those of the reference run.

        `set_aside`: a checkpoint can have been set aside.
        """
        self.check_outputs()
        complete = self.is_complete(self.request.files[0]) and not self.has_checkpoint and not self.request.replaces
        run = self.start()
        run.wait()
        assert run.code == 0 or (complete and run.code == CANNOT_CREATE), run.read_stderr()
        self.check_complete(set_aside)
        return run

    def check_recovery(self, run: Run) -> None:
        """Check that the exit code of a run with a fault is right, and that the same command without it completes."""
        assert "Traceback" not in run.read_stderr()
        self.check_outputs()
        if run.code == 0:
            assert all(map(self.is_complete, self.request.files)), run.read_stderr()
        if run.code or self.list_leftovers():
            self.rerun_to_completion()

    def check_resume(self, run: Run, saved: bool) -> None:
        """Check that the same command completes an interrupted run; if steps were `saved`, they are not repeated."""
        had_checkpoint, complete = self.has_checkpoint, self.is_complete(self.request.files[0])
        self.count(run.find_last_stage())
        self.count("(complete)" if complete else "(resumed)" if had_checkpoint else "(restarted)")
        if saved:
            assert had_checkpoint or complete or run.list_steps() == []
        last = self.rerun_to_completion()
        if saved and had_checkpoint:  # a resumed run first reports the last saved step
            assert set(run.list_steps()) & set(last.list_steps()[1:]) == set()

    def check_complete(self, set_aside: bool = False) -> None:
        """Check that all files exist and are right, and that no others exist."""
        for name, expected in self.expected.files.items():
            assert (self.folder / name).exists(), f"{name} is missing"
            found = (self.folder / name).read_bytes()
            assert found == expected, f"{name}: {describe_difference(found, expected)}"
        assert [name for name in self.list_leftovers() if not (set_aside and ".aside-" in name)] == []

    def clear(self) -> None:
        """Delete the folder to free its disk space."""
        shutil.rmtree(self.folder)

    def is_complete(self, name: str) -> bool:
        path = self.folder / name
        return path.exists() and path.read_bytes() == self.expected.files[name]

    def list_leftovers(self) -> list[str]:
        """Return the files that should not exist after a complete run."""
        return sorted({path.name for path in self.folder.iterdir()} - {*self.request.files, "source.png"})


def describe_difference(found: bytes, expected: bytes) -> str:
    """Describe how two images differ."""
    try:
        pixels = [np.asarray(Image.open(BytesIO(data))).astype(int) for data in (found, expected)]
    except OSError as error:
        return f"not a complete image ({error}), {len(found)} bytes of {len(expected)}"
    if pixels[0].shape != pixels[1].shape:
        return f"another size: {pixels[0].shape}, not {pixels[1].shape}"
    errors = np.abs(pixels[0] - pixels[1])
    return f"{(errors > 0).any(-1).mean():.1%} of the pixels differ, by up to {errors.max()}"
