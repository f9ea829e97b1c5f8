"""Keep the keys of a checkpoint that only a later version knows: they are put aside when it is read, and saved again.

The known keys are a tree: a key maps to the known keys below it, to the `Items` of a list, or to None if everything
below it is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

KnownKeys = Mapping[str, "KnownKeys | Items | None"]
Known = tuple[KnownKeys, Mapping[str, KnownKeys]]  # of the metadata of a checkpoint, and of the sections of its state


@dataclass(frozen=True)
class Items:
    """The known keys of the items of a list.

    `identity` are the keys whose values say which item of another save is the same one, for example its name. Items of
    equal identity are told apart by their order.
    """

    keys: KnownKeys
    identity: tuple[str, ...] = ()


def split_keys(value: Any, known: KnownKeys | Items | None) -> tuple[Any, dict[Any, Any]]:
    """Return `value` with its known keys only, and its extra keys, nested as in `value`."""
    if isinstance(known, Items) and isinstance(value, list):
        items = [split_keys(item, known.keys) for item in value]
        extras = {name: extra for name, (_, extra) in zip(identify(value, known), items, strict=True) if extra}
        return [item for item, _ in items], extras
    if not isinstance(known, Mapping) or not isinstance(value, Mapping):
        return value, {}
    parts = {key: split_keys(item, known[key]) for key, item in value.items() if key in known}
    extra = {key: below for key, (_, below) in parts.items() if below}
    extra |= {key: item for key, item in value.items() if key not in known}
    return {key: item for key, (item, _) in parts.items()}, extra


def add_keys(value: Any, extra: Mapping[Any, Any], known: KnownKeys | Items | None) -> Any:
    """Return `value` with the `extra` keys that `split_keys` took; those below a known key that is gone are dropped."""
    if isinstance(known, Items) and isinstance(value, list):
        names = identify(value, known)
        return [add_keys(item, extra.get(name, {}), known.keys) for name, item in zip(names, value, strict=True)]
    if not isinstance(known, Mapping) or not isinstance(value, Mapping):
        return value
    own = {key: add_keys(item, extra.get(key, {}), known.get(key)) for key, item in value.items()}
    return own | {key: item for key, item in extra.items() if key not in known and key not in own}


def identify(items: Iterable[Any], known: Items) -> Iterator[Hashable]:
    """Yield the identity of each item in a list."""
    counts: Counter[Hashable] = Counter()
    for item in items:
        name = tuple(str(item.get(key)) for key in known.identity) if isinstance(item, Mapping) else ()
        counts[name] += 1
        yield name, counts[name]
