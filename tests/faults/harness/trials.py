"""One request that something happens to, and what must be true of its files whatever that was."""

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
from tests.faults.harness.runs import CANNOT_CREATE, Run, Server, truly_started

NOBODY = 65534


@dataclass(frozen=True)
class Undisturbed:
    """What a request makes if nothing happens: its files, when what happened, and the calls that changed files."""

    files: dict[str, bytes]
    timeline: list[float]
    calls: list[str]


@dataclass
class Lab:
    """Where trials are made: the server, threads to wait in, a count of what happened, what undisturbed runs made."""

    folder: Path
    server: Server
    pool: Executor
    tally: dict[str, Counter[str]]
    _undisturbed: dict[str, Undisturbed] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))
    _one_at_a_time: Lock = field(default_factory=Lock)

    def trial(self, kind: str, name: str, within: Path | None = None, as_nobody: bool = False) -> "Trial":
        """The request `name` in a new folder; `as_nobody`: not by root, whom no file's mode stops."""
        folder = REQUESTS[name].begin_in((within or self.folder) / f"{next(self._numbers):05}-{name}")
        user = NOBODY if as_nobody and os.geteuid() == 0 else None
        if user:
            for path in (folder, *folder.iterdir()):
                os.chown(path, user, user)
        return Trial(self, kind, name, REQUESTS[name], folder, user)

    def undisturbed(self, name: str) -> Undisturbed:
        with self._one_at_a_time:
            if name not in self._undisturbed:
                trial = self.trial("undisturbed", name)
                run = trial.start()
                assert run.wait() == 0, run.stderr()
                files = {file: (trial.folder / file).read_bytes() for file in trial.request.files}
                assert trial.left_over() == []
                self._undisturbed[name] = Undisturbed(files, run.timeline(), run.calls())
            return self._undisturbed[name]

    def count(self, kind: str, what: str) -> None:
        with self._one_at_a_time:
            self.tally[kind][what] += 1


@dataclass
class Trial:
    lab: Lab
    kind: str
    name: str
    request: Request
    folder: Path
    user: int | None = None

    @property
    def expected(self) -> Undisturbed:
        return self.lab.undisturbed(self.name)

    @property
    def store(self) -> Path:
        image = self.request.files[0]
        return self.folder / f"{image}.linfusion"

    @property
    def has_journal(self) -> bool:
        return (self.store / "journal.json").exists()

    def start(self, fault: Fault | None = None, **more: Any) -> Run:
        return self.lab.server.start(self.request.arguments, self.folder, fault, user=self.user, **more)

    def reaches(self, run: Run, share: float) -> bool:
        """Wait until a run is as far as an undisturbed one after a share of its life; False if it ends before."""
        return run.reaches(share * self.expected.timeline[-1], self.expected.timeline)

    def start_truly(self) -> Run:
        return truly_started(self.request.arguments, self.folder, self.lab.server.new_log())

    def count(self, what: str) -> None:
        self.lab.count(self.kind, what)

    def check_names(self) -> None:
        """Under a final name there is a complete file, or nothing (or what was to be replaced)."""
        for name, expected in self.expected.files.items():
            path = self.folder / name
            if path.exists() and (found := path.read_bytes()) != expected:
                assert self.request.replaces and found == OLD, f"{name}: {difference(found, expected)}"

    def completes(self, aside: bool = False) -> Run:
        """Run the same command: it makes, or has made, the files of an undisturbed run. `aside` says that a journal
        may have been set aside."""
        self.check_names()
        complete = self.is_complete(self.request.files[0]) and not self.has_journal and not self.request.replaces
        run = self.start()
        run.wait()
        assert run.code == 0 or (complete and run.code == CANNOT_CREATE), run.stderr()
        self.check_complete(aside)
        return run

    def recovers(self, run: Run) -> None:
        """What some fault befell has told the truth by its code; the same command, now without it, ends well."""
        assert "Traceback" not in run.stderr()
        self.check_names()
        if run.code == 0:
            assert all(map(self.is_complete, self.request.files)), run.stderr()
        if run.code or self.left_over():
            self.completes()

    def goes_on(self, run: Run, saved: bool) -> None:
        """What ended in the middle is completed by the same command; steps that were `saved` are not done again."""
        had_journal, complete = self.has_journal, self.is_complete(self.request.files[0])
        self.count(run.place())
        self.count("(complete)" if complete else "(resumed)" if had_journal else "(begun anew)")
        if saved:
            assert had_journal or complete or run.steps() == []
        last = self.completes()
        if saved and had_journal:  # what goes on says at first which step it has come to: that one is not done again
            assert set(run.steps()) & set(last.steps()[1:]) == set()

    def check_complete(self, aside: bool = False) -> None:
        """All files are there, and nothing else."""
        for name, expected in self.expected.files.items():
            assert (self.folder / name).exists(), f"{name} is missing"
            found = (self.folder / name).read_bytes()
            assert found == expected, f"{name}: {difference(found, expected)}"
        assert [name for name in self.left_over() if not (aside and ".aside-" in name)] == []

    def clear(self) -> None:
        """Give back the room that its files take."""
        shutil.rmtree(self.folder)

    def is_complete(self, name: str) -> bool:
        path = self.folder / name
        return path.exists() and path.read_bytes() == self.expected.files[name]

    def left_over(self) -> list[str]:
        """What is in the folder and should not be, once the run is complete."""
        return sorted({path.name for path in self.folder.iterdir()} - {*self.request.files, "source.png"})


def difference(found: bytes, expected: bytes) -> str:
    """How two pictures differ, for a person."""
    try:
        pixels = [np.asarray(Image.open(BytesIO(data))).astype(int) for data in (found, expected)]
    except OSError as error:
        return f"not a complete picture ({error}), {len(found)} bytes of {len(expected)}"
    if pixels[0].shape != pixels[1].shape:
        return f"another size: {pixels[0].shape}, not {pixels[1].shape}"
    wrong = np.abs(pixels[0] - pixels[1])
    return f"{(wrong > 0).any(-1).mean():.1%} of the pixels differ, by {wrong.max()} or less"
