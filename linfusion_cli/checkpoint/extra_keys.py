"""Keep the keys of a checkpoint that only a later version knows: they are put aside when it is read, and saved again.

The known keys are a tree: a key maps to the known keys below it, or to None if everything below it is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KnownKeys = Mapping[str, "KnownKeys | None"]


def split_keys(value: Any, known: KnownKeys | None) -> tuple[Any, dict[str, Any]]:
    """Return `value` with its known keys only, and its extra keys, nested as in `value`."""
    if known is None or not isinstance(value, Mapping):
        return value, {}
    parts = {key: split_keys(item, known[key]) for key, item in value.items() if key in known}
    extra = {key: below for key, (_, below) in parts.items() if below}
    extra |= {key: item for key, item in value.items() if key not in known}
    return {key: item for key, (item, _) in parts.items()}, extra


def add_keys(value: Any, extra: Mapping[str, Any], known: KnownKeys | None) -> Any:
    """Return `value` with the `extra` keys that `split_keys` took; those below a known key that is gone are dropped."""
    if known is None or not isinstance(value, Mapping):
        return value
    own = {key: add_keys(item, extra.get(key, {}), known.get(key)) for key, item in value.items()}
    return own | {key: item for key, item in extra.items() if key not in known and key not in own}
