"""Run one mutant in a copy of the tree: apply the edit, run its tests, return the verdict."""

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

MAX_TRIAL_SEC = 900.0  # an edit can cause an endless loop, which counts as detected
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfE")
FIRST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
PASSED, FAILED = 0, 1  # exit codes of pytest; others mean that no test ran
SHOWN_LINES = 25


@dataclass(frozen=True)
class Verdict:
    """Result of a test run: pytest's exit `code`, None after a timeout; first failed test or error as `cause`."""

    code: int | None
    cause: str
    seconds: float
    output: str

    @property
    def passed(self) -> bool:
        """Whether all tests passed."""
        return self.code == PASSED

    @property
    def is_killed(self) -> bool:
        """Whether a test failed or timed out."""
        return self.code is None or self.code == FAILED


def copy_tree(root: Path, copy: Path) -> None:
    """Copy the current content of all files at `root` that git does not ignore to `copy`."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=False, capture_output=True)
    if listed.returncode:
        raise SystemExit(f"git cannot list the files in {root}: {os.fsdecode(listed.stderr).strip()}")
    for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
        if os.path.lexists(root / name):  # skip files deleted since the last commit
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name, follow_symlinks=False)


def imports_from(copy: Path, package: str) -> bool:
    """Return whether a process started by a test, in any folder, imports `package` from `copy`."""
    code = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).origin)"
    command = [sys.executable, "-c", code, package]
    done = subprocess.run(
        command, env=build_environment(copy), cwd=copy.parent, capture_output=True, text=True, check=False
    )
    return done.returncode == 0 and Path(done.stdout.strip()).is_relative_to(copy)


def run_mutant(mutant: Mutant, copy: Path) -> Verdict:
    """Run the mutant's tests in `copy` with its edit."""
    with apply_edit(copy / mutant.file, mutant):
        return run_tests(mutant.tests, copy)


@contextmanager
def apply_edit(path: Path, mutant: Mutant) -> Iterator[None]:
    """Apply the mutant's edit to the file at `path` within the context."""
    original = path.read_bytes()
    path.write_bytes(mutant.apply(original.decode()).encode())
    try:
        yield
    finally:
        path.write_bytes(original)


def run_tests(tests: Sequence[str], copy: Path) -> Verdict:
    """Run `tests` in `copy` in a new session; kill all processes started by the tests at the end."""
    began, code = time.monotonic(), None
    command = [sys.executable, "-m", "pytest", *OPTIONS, *tests]
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=build_environment(copy),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=MAX_TRIAL_SEC)
        code = process.returncode
    except subprocess.TimeoutExpired:
        kill_group(process.pid)
        output, _ = process.communicate()
    finally:
        kill_group(process.pid)
    text = output.decode(errors="replace")
    return Verdict(
        code, describe_cause(code, text), time.monotonic() - began, "\n".join(text.splitlines()[-SHOWN_LINES:])
    )


def describe_cause(code: int | None, output: str) -> str:
    """Return the first failed test or the reason why no test failed."""
    if code is None:
        return f"timeout after {MAX_TRIAL_SEC:.0f} s"
    failure = FIRST_FAILURE.search(output)
    return failure[1] if failure else f"pytest's exit code {code}"


def kill_group(number: int) -> None:
    """Kill the process group if it still exists."""
    with suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)


def build_environment(copy: Path) -> Mapping[str, str]:
    """Build the environment of the tests: `copy` precedes the installed package, and no bytecode is written.

    Python would use outdated bytecode after an edit within the same second that does not change the file's size.
    """
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    path = os.pathsep.join(filter(None, [str(copy), os.environ.get("PYTHONPATH")]))
    return variables | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
