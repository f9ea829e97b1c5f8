"""The mutants of `mutants.toml`, and what can be wrong with a row."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).parent / "mutants.toml"


@dataclass(frozen=True)
class Mutant:
    """`what` is wrong once `after` stands in `file` in the place of `before`; `tests` are pytest's names for them."""

    name: str
    what: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def mutated(self, text: str) -> str:
        """The content of the file with the edit."""
        return text.replace(self.before, self.after)

    def faults(self, root: Path) -> Iterator[str]:
        """What makes this row useless for the tree at `root`, in words: nothing, if all is well."""
        path = root / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (found := text.count(self.before)) != 1:
            yield f"its text is in {self.file} {found} times, not once"
        elif not is_python(self.mutated(text)):
            yield f"{self.file} with its edit is not Python"
        if self.before == self.after:
            yield "its edit changes nothing"
        for test in self.tests:
            if not has_test(root, test):
                yield f"there is no {test}"
        if not self.tests:
            yield "it names no test"


def read_table(path: Path = TABLE) -> list[Mutant]:
    """The rows in the order of the file."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Mutant(name, **row | {"tests": tuple(row["tests"])}) for name, row in rows.items()]


def is_python(text: str) -> bool:
    try:
        compile(text, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def has_test(root: Path, test: str) -> bool:
    """Whether there is this file of tests and, where `test` names one of them, a function of that name in it."""
    name, _, function = test.partition("::")
    path = root / name
    return path.is_file() and (not function or f"def {function}(" in path.read_text(encoding="utf-8"))
