"""`python -m tools.mutants [NAME ...]`: makes each wrong edit in a copy of this tree, and runs the tests next to it.

A mutant is killed where a test fails. The exit code is 1 if one survives, if a row of `mutants.toml` no longer fits the
code, or if the tests fail without any edit; 2 for a name that is not in the table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.mutants.table import ROOT, Mutant, read_table
from tools.mutants.trial import Verdict, copy_tree, imports_from, run_tests, try_mutant


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, table: Sequence[Mutant] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__.split(": ", 1)[1])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to try, M05 say; all, if none is named")
    parser.add_argument("--list", action="store_true", help="only say what they are")
    options = parser.parse_args(arguments)
    mutants = read_table() if table is None else list(table)
    wanted = {name.upper() for name in options.names}
    if unknown := sorted(wanted - {mutant.name for mutant in mutants}):
        sys.stderr.write(f"There is no mutant {', '.join(unknown)}: --list shows all names.\n")
        return 2
    chosen = [mutant for mutant in mutants if not wanted or mutant.name in wanted]
    if options.list:
        sys.stdout.writelines(f"{mutant.name}  {mutant.file}: {mutant.what}\n" for mutant in chosen)
        return 0
    return try_all(chosen, root)


def try_all(mutants: Sequence[Mutant], root: Path) -> int:
    """Try `mutants` one after the other in one copy of the tree at `root` -> exit code."""
    with tempfile.TemporaryDirectory(prefix="linfusion-mutants-") as name:
        copy = Path(name) / "tree"
        copy_tree(root, copy)
        faulty = {mutant.name: faults for mutant in mutants if (faults := list(mutant.faults(copy)))}
        sound = [mutant for mutant in mutants if mutant.name not in faulty]
        for name, faults in faulty.items():
            say(f"{name}  BROKEN: {'; '.join(faults)}")
        if sound and not is_ready(sound, copy):
            return 1
        verdicts = [told(mutant, try_mutant(mutant, copy)) for mutant in sound]
    killed = sum(verdict.is_killed for verdict in verdicts)
    say(f"{killed} of {len(mutants)} killed")
    return 0 if killed == len(mutants) else 1


def is_ready(mutants: Sequence[Mutant], copy: Path) -> bool:
    """Whether tests in `copy` import what lies there, and all that the mutants name pass without any edit."""
    for package in sorted({mutant.file.split("/", 1)[0] for mutant in mutants}):
        if not imports_from(copy, package):
            say(f"The tests would import another {package} than the copy's, which lies in {copy}.")
            return False
    verdict = run_tests(sorted({test for mutant in mutants for test in mutant.tests}), copy)
    if verdict.passed:
        say(f"without any edit all tests pass{verdict.seconds:8.1f} s")
    else:
        say(f"The tests fail without any edit ({verdict.by}):\n{verdict.output}")
    return verdict.passed


def told(mutant: Mutant, verdict: Verdict) -> Verdict:
    """A line for the verdict on `mutant`, and the output of tests that did not come to one."""
    if verdict.is_killed:
        say(f"{mutant.name}  killed{verdict.seconds:8.1f} s  by {verdict.by}")
    elif verdict.passed:
        say(f"{mutant.name}  SURVIVED{verdict.seconds:6.1f} s  {mutant.what}")
    else:
        say(f"{mutant.name}  BROKEN{verdict.seconds:8.1f} s  {verdict.by}:\n{verdict.output}")
    return verdict


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
