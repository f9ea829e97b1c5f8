"""Read a text file line by line in bounded memory. Invalid lines are reported; files that are not text are rejected."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import BinaryIO

from linfusion_cli.core.errors import DataError

MAX_JOB_BYTES = 100_000  # of one job: a prompt has a few hundred
START_BYTES = 200  # of a line with a problem: enough to recognise a format
TOO_LONG = f"It is longer than {MAX_JOB_BYTES // 1000} kB, which no job may be."
NOT_UTF8 = "It is not valid UTF-8."
BYTE_ORDER_MARK = "\ufeff"
ENCODINGS = {  # UTF-32 first: in little-endian order its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
BINARY_FORMATS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"%PDF-": "a PDF document",
    b"PK\x03\x04": "a ZIP archive or an office document",
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ\0": "compressed with xz",
}
NEEDS_TEXT = "A list of jobs is text in UTF-8."


@dataclass(frozen=True, slots=True)
class Line:
    """A line's number, counted from 1, and its text without the end; with a `problem`, only the start of its text."""

    number: int
    text: str
    problem: str = ""


def read_lines(file: BinaryIO, name: str) -> Iterator[Line]:
    """Every line of `file`, which is UTF-8; raises DataError, naming it `name`, if it is another encoding or binary."""
    for number in count(1):
        raw = b""
        for piece in _pieces(file):
            if number == 1 and not raw:
                _check_start(piece, name)
            if b"\0" in piece:
                what = f"{name} has a NUL byte in line {number}, as images and UTF-16 text have."
                raise DataError(what, NEEDS_TEXT)
            raw = raw or piece
        if not raw:
            return
        yield _line(number, raw.removesuffix(b"\n").removesuffix(b"\r"))


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """The next line of `file`; the first piece holds all of it if it is short enough for a job."""
    while piece := file.readline(MAX_JOB_BYTES + 2):
        yield piece
        if piece.endswith(b"\n"):
            return


def _check_start(start: bytes, name: str) -> None:
    """Raise DataError if a file that begins like this is not UTF-8 text."""
    for mark, encoding in ENCODINGS.items():
        if start.startswith(mark):
            raise DataError(f"{name} is {encoding} text.", f"Convert it: iconv -f {encoding} -t UTF-8")
    for magic, what in BINARY_FORMATS.items():
        if start.startswith(magic):
            raise DataError(f"{name} is {what}.", NEEDS_TEXT)


def _line(number: int, raw: bytes) -> Line:
    problem = TOO_LONG if len(raw) > MAX_JOB_BYTES else ""
    if not problem:
        try:
            return Line(number, _without_mark(number, raw.decode("utf-8")))
        except UnicodeDecodeError:
            problem = NOT_UTF8
    return Line(number, _without_mark(number, raw[:START_BYTES].decode("utf-8", "replace")), problem)


def _without_mark(number: int, text: str) -> str:
    return text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text
