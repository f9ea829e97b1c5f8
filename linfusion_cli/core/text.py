"""Shorten and quote text for messages: one line, a bounded number of letters."""

from __future__ import annotations

from typing import Any

MAX_QUOTED = 60  # letters of a quoted value: the message about a value of 100 kB is one sentence


def quote(value: Any) -> str:
    """What was written, in quotes where it is text, cut to a few words."""
    return shorten(repr(value[:MAX_QUOTED] + "…" if isinstance(value, str) and len(value) > MAX_QUOTED else value))


def shorten(text: str, most: int = MAX_QUOTED + 8) -> str:
    """`text`, cut to so many letters, in one line that does nothing to a terminal; a word takes two thirds at most."""
    words = (truncate(word, most * 2 // 3) for word in text.split())
    return truncate("".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(words)), most)


def truncate(text: str, most: int) -> str:
    """The first letters of it."""
    return text if len(text) <= most else text[: most - 1] + "…"
