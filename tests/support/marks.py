"""Parameters of which only some are quick: the others run in the slow suite."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """`values` as parameters of a test, all but the `quick` ones marked as slow; tuples are several parameters each."""
    return [value if value in quick else pytest.param(*_several(value), marks=pytest.mark.slow) for value in values]


def _several(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)
