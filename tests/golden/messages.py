"""All texts for users in one file, for review: error messages, hints, notices and help texts.

    python -m tests.golden.messages      writes tests/golden/messages.txt; required after a text has changed

They are extracted from the source: all strings of at least three words except docstrings, and the docstrings of
commands, which are help texts. Values are shown as expressions in braces.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("messages.txt")
SENTENCE = re.compile(r"[A-Za-z{][^ ]* [^ ]+ [^ ]")
PATTERN = re.compile(r"\(\?:|\\[swdb]|\[\^")  # regular expressions are not texts


def collect_messages() -> str:
    """Return the texts of all modules, in the order of the source."""
    parts = []
    for path in sorted((ROOT / "linfusion_cli").rglob("*.py")):
        texts = list(dict.fromkeys(texts_in(path)))
        if texts:
            parts.append(f"## {path.relative_to(ROOT)}\n" + "".join(f"{text}\n" for text in texts))
    return "\n".join(parts)


def texts_in(path: Path) -> Iterator[str]:
    """Yield the texts of one module, each in one line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node) for node in docstring_nodes(tree, keep_commands="commands" in path.parts)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)]
    strings = [node for node in found if isinstance(node, ast.JoinedStr)]
    inside = {id(child) for node in strings for child in ast.walk(node) if child is not node}
    for node in sorted(found, key=lambda node: (node.lineno, node.col_offset)):
        if id(node) in docstrings or id(node) in inside:
            continue
        text = render(node)
        if text is not None and SENTENCE.search(text) and not PATTERN.search(text):
            yield " ".join(text.split())


def render(node: ast.Constant | ast.JoinedStr) -> str | None:
    """Return the text of a string or f-string; None for other constants."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    return "".join(
        str(part.value) if isinstance(part, ast.Constant) else "{" + ast.unparse(part.value) + "}"
        for part in node.values
        if isinstance(part, ast.Constant | ast.FormattedValue)
    )


def docstring_nodes(tree: ast.Module, keep_commands: bool) -> Iterator[ast.Constant]:
    """Yield the docstrings in a module, without those of commands if these are to be kept."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            is_command = isinstance(node, ast.FunctionDef) and (node.decorator_list or node.name == "command")
            statement = node.body[0]
            is_kept = keep_commands and is_command
            if not is_kept and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield statement.value


if __name__ == "__main__":
    FILE.write_text(collect_messages(), encoding="utf-8")
    sys.stdout.write(f"{FILE}: {len(collect_messages().splitlines())} lines\n")
