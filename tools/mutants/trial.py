"""One mutant in a copy of the tree: the edit, the tests, and what came of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tools.mutants.table import Mutant

LIMIT_SEC = 900.0  # an edit may make an endless loop of a program, which counts as noticed
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfE")
FIRST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
PASSED, FAILED = 0, 1  # exit codes of pytest; others mean that tests were not run
SHOWN_LINES = 25


@dataclass(frozen=True)
class Verdict:
    """What pytest's exit `code` says, `None` where the time was over; the first test that failed, or why none ran."""

    code: int | None
    by: str
    seconds: float
    output: str

    @property
    def passed(self) -> bool:
        return self.code == PASSED

    @property
    def is_killed(self) -> bool:
        return self.code is None or self.code == FAILED


def copy_tree(root: Path, copy: Path) -> None:
    """Copy all files that git tracks, or does not ignore, to `copy`, as they are in the work tree at `root` now."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=False, capture_output=True)
    if listed.returncode:
        raise SystemExit(f"git cannot list the files in {root}: {os.fsdecode(listed.stderr).strip()}")
    for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
        if os.path.lexists(root / name):  # not one that was removed since the last commit
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name, follow_symlinks=False)


def imports_from(copy: Path, package: str) -> bool:
    """Whether a process that a test starts, in whatever folder, finds `package` in `copy`."""
    code = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).origin)"
    command = [sys.executable, "-c", code, package]
    done = subprocess.run(command, env=environment(copy), cwd=copy.parent, capture_output=True, text=True, check=False)
    return done.returncode == 0 and Path(done.stdout.strip()).is_relative_to(copy)


def try_mutant(mutant: Mutant, copy: Path) -> Verdict:
    """Run the mutant's tests in `copy` with its edit."""
    with edited(copy / mutant.file, mutant):
        return run_tests(mutant.tests, copy)


@contextmanager
def edited(path: Path, mutant: Mutant) -> Iterator[None]:
    """Within the context the file at `path` has the mutant's edit."""
    original = path.read_bytes()
    path.write_bytes(mutant.mutated(original.decode()).encode())
    try:
        yield
    finally:
        path.write_bytes(original)


def run_tests(tests: Sequence[str], copy: Path) -> Verdict:
    """Run `tests` in `copy`, in a session of its own: when it is over, no process that a test has started is left."""
    began, code = time.monotonic(), None
    command = [sys.executable, "-m", "pytest", *OPTIONS, *tests]
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=environment(copy),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_SEC)
        code = process.returncode
    except subprocess.TimeoutExpired:
        kill_group(process.pid)
        output, _ = process.communicate()
    finally:
        kill_group(process.pid)
    text = output.decode(errors="replace")
    return Verdict(code, cause(code, text), time.monotonic() - began, "\n".join(text.splitlines()[-SHOWN_LINES:]))


def cause(code: int | None, output: str) -> str:
    """The first test that failed, or why there is none."""
    if code is None:
        return f"the time limit of {LIMIT_SEC:.0f} s"
    failure = FIRST_FAILURE.search(output)
    return failure[1] if failure else f"pytest's exit code {code}"


def kill_group(number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)


def environment(copy: Path) -> Mapping[str, str]:
    """Here PYTHONPATH goes before the installed package. No bytecode is kept: an edit in the same second that does not
    change a file's size would not be noticed, and the tests would run the code before it."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    path = os.pathsep.join(filter(None, [str(copy), os.environ.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
