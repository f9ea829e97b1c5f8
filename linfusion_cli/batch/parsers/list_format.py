"""Detect the format of a job list by its suffix or its first lines, and reject other files."""

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
SUFFIX_HINT = (
    "Job lists end in .jsonl or .ndjson (one JSON object per line), .csv (comma-separated), .toml ([[job]] tables) "
    "or .txt (one prompt per line)."
)
TABLE = re.compile(r"\s*\[\[\s*job\s*\]\]\s*(#.*)?")
# The start of a JSON or Python array, but not of prompts for A1111: [cat:dog:0.5], [1girl:2girls:5], [true love].
VALUE = r"(?:[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|true|false|null|True|False|None)"
ARRAY = re.compile(rf"""\[\s*(?:[{{"'\[\]]|$|{VALUE}\s*(?:[],]|$))""")
OBJECT = re.compile(r'\{\s*"')
YAML = re.compile(rf"---\s*$|-\s+(?:{'|'.join(FIELDS)})\s*:(?:\s|$)")
MARKUP = re.compile(r"<(?:\?xml|!doctype|html)\b", re.IGNORECASE)
SEPARATORS = re.compile(r"[,;\t|]")  # the CSV reader accepts commas only, and reports the others
ONE_PER_LINE = 'Write JSONL, one object per line: {"prompt": "a hill"}'


def has_list_suffix(name: str) -> bool:
    """Return True if a file with this name can be a job list."""
    return PurePath(name).suffix.lower() in SUFFIXES


def check_suffix(path: PurePath) -> None:
    """Raise DataError if the file has a suffix, but not that of a job list."""
    if path.suffix and not has_list_suffix(path.name):
        raise DataError(f"{path} is not a job list: its suffix is {quote(path.suffix)}.", SUFFIX_HINT)


def detect_format(suffix: str, lines: Iterator[Line], name: str) -> tuple[Format, Iterator[Line]]:
    """Return the format, by the suffix or else by the first lines, and the lines without leading blank ones.

    Raises DataError, with `name` for the list, if it starts like another format.
    """
    expected = SUFFIXES.get(suffix.lower())
    if expected in ("CSV", "TOML"):  # their readers reject lists without a header or [[job]]
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
    if other := _detect_other_format(text, expected, is_json):
        description, hint = other
        raise DataError(f"{name} looks like {description} (line {first.number}: {quote(text)}).", hint)
    return "JSONL" if is_json else "text", lines


def _skip(lines: Iterator[Line], comments: bool = False) -> tuple[Line | None, Iterator[Line]]:
    """Return the first line that is not blank (nor, with `comments`, a comment), and the lines from there on."""
    for line in lines:
        text = line.text.strip()
        if line.problem or (text and not (comments and text.startswith("#"))):
            return line, chain([line], lines)
    return None, lines


def _detect_other_format(text: str, expected: Format | None, is_json: bool) -> tuple[str, str] | None:
    """Return the other format that the first line of a JSONL or text list looks like, and a hint; None if it fits."""
    if TABLE.fullmatch(text):
        return "TOML", "Use the suffix .toml."
    if ARRAY.match(text):
        return "a JSON array", ONE_PER_LINE
    if is_json:
        return None
    if expected is None and text.startswith("["):
        return "a JSON array", "Write JSONL, one object per line, or put prompts that start with [ into a .txt file."
    if OBJECT.match(text):
        return "JSONL", "Use the suffix .jsonl." if expected else "Remove the comments above: JSONL has none."
    if _is_certain_header(text):
        return "CSV", "Use the suffix .csv, and separate the columns by commas."
    if YAML.match(text):
        return "YAML", ONE_PER_LINE
    return ("HTML or XML", ONE_PER_LINE) if MARKUP.match(text) else None


def _is_header(text: str) -> bool:
    """Return True for a CSV header, valid or not: the CSV reader reports its problem."""
    names = _split_columns(text)
    if len(names) == 1:
        return names[0] in ("prompt", "image")  # other field names, such as model, are also words in prompts
    return all(name in FIELDS for name in names) or "prompt" in map(str.lower, names)


def _is_certain_header(text: str) -> bool:
    """Return True if this can only be a CSV header, even where one prompt per line is expected."""
    names = _split_columns(text)
    return len(names) > 1 and "prompt" in names and all(name in FIELDS for name in names)


def _split_columns(text: str) -> list[str]:
    return [cell.strip().strip('"') for cell in SEPARATORS.split(text)]
