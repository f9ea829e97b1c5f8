"""Parametrization with some quick values; the others run in the slow suite."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return `values` for parametrize, all but the `quick` ones marked as slow; a tuple has several parameters."""
    return [value if value in quick else pytest.param(*_as_tuple(value), marks=pytest.mark.slow) for value in values]


def _as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)
