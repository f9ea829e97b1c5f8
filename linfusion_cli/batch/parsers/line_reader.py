"""Read a text file line by line in bounded memory; report invalid lines, and reject files that are not text."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import BinaryIO

from linfusion_cli.core.errors import DataError

MAX_JOB_BYTES = 100_000  # of one job; a prompt has a few hundred bytes
START_BYTES = 200  # kept of an invalid line: enough to detect a format
TOO_LONG = f"The job is longer than {MAX_JOB_BYTES // 1000} kB."
NOT_UTF8 = "The line is not valid UTF-8."
BYTE_ORDER_MARK = "\ufeff"
ENCODINGS = {  # UTF-32 first: its little-endian mark starts with that of UTF-16
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
NEEDS_TEXT = "Job lists are UTF-8 text."


@dataclass(frozen=True, slots=True)
class Line:
    """A line: its number, from 1, and its text without the line ending; with a `problem`, only the start of it."""

    number: int
    text: str
    problem: str = ""


def read_lines(file: BinaryIO, name: str) -> Iterator[Line]:
    """Yield the lines of a UTF-8 file; raise DataError, which calls it `name`, for other encodings or binary data."""
    for number in count(1):
        raw = b""
        for piece in _read_pieces(file):
            if number == 1 and not raw:
                _check_start(piece, name)
            if b"\0" in piece:
                reason = f"{name} has a NUL byte in line {number}, like an image or UTF-16 text."
                raise DataError(reason, NEEDS_TEXT)
            raw = raw or piece
        if not raw:
            return
        yield _decode_line(number, raw.removesuffix(b"\n").removesuffix(b"\r"))


def _read_pieces(file: BinaryIO) -> Iterator[bytes]:
    """Yield the next line of `file` in pieces; a line that is short enough for a job is one piece."""
    while piece := file.readline(MAX_JOB_BYTES + 2):
        yield piece
        if piece.endswith(b"\n"):
            return


def _check_start(start: bytes, name: str) -> None:
    """Raise DataError if `start` is the start of a file that is not UTF-8 text."""
    for mark, encoding in ENCODINGS.items():
        if start.startswith(mark):
            raise DataError(f"{name} is {encoding} text.", f"Convert it: iconv -f {encoding} -t UTF-8")
    for magic, description in BINARY_FORMATS.items():
        if start.startswith(magic):
            raise DataError(f"{name} is {description}.", NEEDS_TEXT)


def _decode_line(number: int, raw: bytes) -> Line:
    problem = TOO_LONG if len(raw) > MAX_JOB_BYTES else ""
    if not problem:
        try:
            return Line(number, _strip_mark(number, raw.decode("utf-8")))
        except UnicodeDecodeError:
            problem = NOT_UTF8
    return Line(number, _strip_mark(number, raw[:START_BYTES].decode("utf-8", "replace")), problem)


def _strip_mark(number: int, text: str) -> str:
    return text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text
