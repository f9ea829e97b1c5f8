"""Quote and shorten text for messages: one line of limited length."""

from __future__ import annotations

from typing import Any

MAX_QUOTED = 60  # characters of a quoted value: values can have 100 kB


def quote(value: Any) -> str:
    """Return the repr of a value, shortened."""
    return shorten(repr(value[:MAX_QUOTED] + "…" if isinstance(value, str) and len(value) > MAX_QUOTED else value))


def shorten(text: str, max_length: int = MAX_QUOTED + 8) -> str:
    """Return the text as one line of at most `max_length` characters, without control characters.

    Words longer than two thirds of that are shortened, too.
    """
    words = (truncate(word, max_length * 2 // 3) for word in text.split())
    return truncate("".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(words)), max_length)


def truncate(text: str, max_length: int) -> str:
    """Return the first characters, ending with an ellipsis if the text is longer than `max_length`."""
    return text if len(text) <= max_length else text[: max_length - 1] + "…"
