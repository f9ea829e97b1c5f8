"""Run mutation tests: apply each wrong edit of `mutants.toml` to a copy of this tree and run the tests it names.

    python -m tools.mutants [NAME ...]

A mutant is killed if a test fails. The exit code is 1 if a mutant survives, if a row of `mutants.toml` does not match
the code, or if the tests fail without any edit; 2 for an unknown name.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.mutants.table import ROOT, Mutant, read_table
from tools.mutants.trial import Verdict, copy_tree, imports_from, run_mutant, run_tests


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, table: Sequence[Mutant] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to run, for example M05 (default: all)")
    parser.add_argument("--list", action="store_true", help="list the mutants without running them")
    options = parser.parse_args(arguments)
    mutants = read_table() if table is None else list(table)
    wanted = {name.upper() for name in options.names}
    if unknown := sorted(wanted - {mutant.name for mutant in mutants}):
        sys.stderr.write(f"Unknown mutant: {', '.join(unknown)}. Use --list to show all names.\n")
        return 2
    chosen = [mutant for mutant in mutants if not wanted or mutant.name in wanted]
    if options.list:
        sys.stdout.writelines(f"{mutant.name}  {mutant.file}: {mutant.description}\n" for mutant in chosen)
        return 0
    return run_all(chosen, root)


def run_all(mutants: Sequence[Mutant], root: Path) -> int:
    """Run `mutants` one after the other in one copy of the tree at `root`; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="linfusion-mutants-") as name:
        copy = Path(name) / "tree"
        copy_tree(root, copy)
        faults_by_name = {mutant.name: faults for mutant in mutants if (faults := list(mutant.find_faults(copy)))}
        valid = [mutant for mutant in mutants if mutant.name not in faults_by_name]
        for name, faults in faults_by_name.items():
            print_line(f"{name}  BROKEN: {'; '.join(faults)}")
        if valid and not is_ready(valid, copy):
            return 1
        verdicts = [report_verdict(mutant, run_mutant(mutant, copy)) for mutant in valid]
    killed = sum(verdict.is_killed for verdict in verdicts)
    print_line(f"{killed} of {len(mutants)} killed")
    return 0 if killed == len(mutants) else 1


def is_ready(mutants: Sequence[Mutant], copy: Path) -> bool:
    """Return whether tests in `copy` import the code in `copy` and all tests named by the mutants pass unmodified."""
    for package in sorted({mutant.file.split("/", 1)[0] for mutant in mutants}):
        if not imports_from(copy, package):
            print_line(f"The tests would not import {package} from the copy in {copy}.")
            return False
    verdict = run_tests(sorted({test for mutant in mutants for test in mutant.tests}), copy)
    if verdict.passed:
        print_line(f"all tests pass without any edit{verdict.seconds:8.1f} s")
    else:
        print_line(f"The tests fail without any edit ({verdict.cause}):\n{verdict.output}")
    return verdict.passed


def report_verdict(mutant: Mutant, verdict: Verdict) -> Verdict:
    """Print the verdict on `mutant` and, if it is broken, the output of its tests; return the verdict."""
    if verdict.is_killed:
        print_line(f"{mutant.name}  killed{verdict.seconds:8.1f} s  by {verdict.cause}")
    elif verdict.passed:
        print_line(f"{mutant.name}  SURVIVED{verdict.seconds:6.1f} s  {mutant.description}")
    else:
        print_line(f"{mutant.name}  BROKEN{verdict.seconds:8.1f} s  {verdict.cause}:\n{verdict.output}")
    return verdict


def print_line(line: str) -> None:
    """Print `line` immediately, even to a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
