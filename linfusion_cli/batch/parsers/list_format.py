"""Recognise the format of a job list by its suffix, else by its first lines, and reject everything else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import PurePath
from typing import Literal

from linfusion_cli.batch.parsers.line_reader import Line
from linfusion_cli.batch.parsers.schema import FIELDS
from linfusion_cli.core.errors import DataError
from linfusion_cli.core.text import quote

Format = Literal["JSONL", "CSV", "TOML", "text"]

SUFFIXES: dict[str, Format] = {".jsonl": "JSONL", ".ndjson": "JSONL", ".csv": "CSV", ".toml": "TOML", ".txt": "text"}
LIST_NAMES = (
    "Lists end in .jsonl or .ndjson (one JSON object per line), .csv (separated by commas), .toml ([[job]] tables) "
    "or .txt (one prompt per line)."
)
TABLE = re.compile(r"\s*\[\[\s*job\s*\]\]\s*(#.*)?")
# The start of a JSON or Python array, and not of A1111's [cat:dog:0.5], [1girl:2girls:5] or [true love].
VALUE = r"(?:[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|true|false|null|True|False|None)"
ARRAY = re.compile(rf"""\[\s*(?:[{{"'\[\]]|$|{VALUE}\s*(?:[],]|$))""")
OBJECT = re.compile(r'\{\s*"')
YAML = re.compile(rf"---\s*$|-\s+(?:{'|'.join(FIELDS)})\s*:(?:\s|$)")
MARKUP = re.compile(r"<(?:\?xml|!doctype|html)\b", re.IGNORECASE)
SEPARATORS = re.compile(r"[,;\t|]")  # a table with others than commas is refused by the reader of CSV
ONE_PER_LINE = 'Write JSONL, one object per line: {"prompt": "a hill"}'


def has_list_suffix(name: str) -> bool:
    """Whether a file of this name may be a list of jobs."""
    return PurePath(name).suffix.lower() in SUFFIXES


def check_suffix(path: PurePath) -> None:
    """Raise DataError if the file's name has a suffix that no list has."""
    if path.suffix and not has_list_suffix(path.name):
        raise DataError(f"{path} is not a list of jobs: it ends in {quote(path.suffix)}.", LIST_NAMES)


def recognise_format(suffix: str, lines: Iterator[Line], name: str) -> tuple[Format, Iterator[Line]]:
    """The format, by suffix or without one by the first lines, and the lines from the first that is not blank.

    Raises DataError, with `name` for the list, if it begins like another format.
    """
    expected = SUFFIXES.get(suffix.lower())
    if expected in ("CSV", "TOML"):  # their readers reject a list without a header or [[job]]
        return expected, lines
    first, lines = _skip(lines)
    is_json = expected == "JSONL" or (expected is None and first is not None and first.text.lstrip().startswith("{"))
    if not is_json:
        first, lines = _skip(lines, comments=True)
    if first is None:
        return expected or "text", lines
    text = first.text.strip()
    if expected is None and TABLE.fullmatch(text):
        return "TOML", lines
    if expected is None and not is_json and _is_header(text):
        return "CSV", lines
    if other := _other_format(text, expected, is_json):
        what, hint = other
        raise DataError(f"{name} looks like {what} (line {first.number}: {quote(text)}).", hint)
    return "JSONL" if is_json else "text", lines


def _skip(lines: Iterator[Line], comments: bool = False) -> tuple[Line | None, Iterator[Line]]:
    """The first line that is not blank (nor a comment, with `comments`), and the lines from there on."""
    for line in lines:
        text = line.text.strip()
        if line.problem or (text and not (comments and text.startswith("#"))):
            return line, chain([line], lines)
    return None, lines


def _other_format(text: str, expected: Format | None, is_json: bool) -> tuple[str, str] | None:
    """Another format that the first line `text` of a JSONL or text list looks like, and a hint; None if it fits."""
    if TABLE.fullmatch(text):
        return "TOML", "End its name in .toml."
    if ARRAY.match(text):
        return "a JSON array", ONE_PER_LINE
    if is_json:
        return None
    if expected is None and text.startswith("["):
        return "a JSON array", "Write JSONL, one object per line, or put prompts that begin with [ into a .txt file."
    if OBJECT.match(text):
        return "JSONL", "End its name in .jsonl." if expected else "Leave out the comments above, which JSONL has not."
    if _is_sure_header(text):
        return "CSV", "End its name in .csv, and separate the columns by commas."
    if YAML.match(text):
        return "YAML", ONE_PER_LINE
    return ("HTML or XML", ONE_PER_LINE) if MARKUP.match(text) else None


def _is_header(text: str) -> bool:
    """Whether this is a CSV header, valid or not: the CSV reader names what is wrong with it."""
    names = _columns(text)
    if len(names) == 1:
        return names[0] in ("prompt", "image")  # other names of fields, such as model, are words of prompts
    return all(name in FIELDS for name in names) or "prompt" in map(str.lower, names)


def _is_sure_header(text: str) -> bool:
    """Whether this can only be a CSV header, also where one prompt per line is expected."""
    names = _columns(text)
    return len(names) > 1 and "prompt" in names and all(name in FIELDS for name in names)


def _columns(text: str) -> list[str]:
    return [cell.strip().strip('"') for cell in SEPARATORS.split(text)]
