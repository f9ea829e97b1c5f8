"""A text file line by line, in bounded memory: lines that are no text, or are too long, are told of and passed over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import BinaryIO

MOST_BYTES = 100_000  # of one job: a prompt has a few hundred
TOO_LONG = f"It is longer than {MOST_BYTES // 1000} kB, which no job may be."
NOT_UTF8 = "It is not valid UTF-8."
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, slots=True)
class Line:
    """A line's number, counted from 1, and its text without the end; or the `problem` why there is none."""

    number: int
    text: str
    problem: str = ""


def lines_of(file: BinaryIO) -> Iterator[Line]:
    """Every line of `file`, which is UTF-8."""
    for number in count(1):
        raw = file.readline(MOST_BYTES + 2)
        if not raw:
            return
        text = raw.removesuffix(b"\n").removesuffix(b"\r")
        if len(text) > MOST_BYTES:
            if not raw.endswith(b"\n"):
                _pass_over(file)
            yield Line(number, "", TOO_LONG)
        else:
            yield _decoded(number, text)


def _pass_over(file: BinaryIO) -> None:
    """Read to the end of the line."""
    while (rest := file.readline(MOST_BYTES)) and not rest.endswith(b"\n"):
        pass


def _decoded(number: int, raw: bytes) -> Line:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return Line(number, "", NOT_UTF8)
    return Line(number, text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text)
