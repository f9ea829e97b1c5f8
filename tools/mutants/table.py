"""Read the mutants of `mutants.toml` and check them against the code."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).parent / "mutants.toml"


@dataclass(frozen=True)
class Mutant:
    """An edit that replaces `before` by `after` in `file`, and the `tests` (pytest names) that must detect it."""

    name: str
    description: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """Return `text`, the content of the file, with the edit applied."""
        return text.replace(self.before, self.after)

    def find_faults(self, root: Path) -> Iterator[str]:
        """Yield the reasons why this row cannot be used with the tree at `root`."""
        path = root / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := text.count(self.before)) != 1:
            yield f"`before` occurs {count} times in {self.file} instead of once"
        elif not is_python(self.apply(text)):
            yield f"{self.file} with the edit is not Python"
        if self.before == self.after:
            yield "the edit changes nothing"
        for test in self.tests:
            if not has_test(root, test):
                yield f"{test} does not exist"
        if not self.tests:
            yield "the row names no test"


def read_table(path: Path = TABLE) -> list[Mutant]:
    """Read all rows, in the order of the file."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Mutant(name, **row | {"tests": tuple(row["tests"])}) for name, row in rows.items()]


def is_python(text: str) -> bool:
    """Return whether `text` compiles."""
    try:
        compile(text, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def has_test(root: Path, test: str) -> bool:
    """Return whether the test file exists and, if `test` names a function, contains it."""
    name, _, function = test.partition("::")
    path = root / name
    return path.is_file() and (not function or f"def {function}(" in path.read_text(encoding="utf-8"))
