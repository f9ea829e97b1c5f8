"""What stays loaded from one job of a batch to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from linfusion_cli.models.files.digest import Identity

Thing = TypeVar("Thing")
Key = Callable[[], Hashable]  # called only where something may be kept


class ModelCache:
    """Keeps one thing under each name, and gives it again for the same key; the old goes before a new one is made.

    A shelf that `keeps` nothing makes everything anew: for a run that is alone. `digests` are of files that were
    hashed, by what tells whether they changed.
    """

    def __init__(self, keeps: bool = True):
        self.keeps = keeps
        self.digests: dict[Identity, str] = {}
        self._things: dict[str, tuple[Hashable, Any]] = {}

    def get(self, name: str, key: Key, make: Callable[[], Thing]) -> Thing:
        """What lies under `name`, if it was made for this key; else what `make` makes."""
        if not self.keeps:
            return make()
        self.evict_stale(name, key)
        if name not in self._things:
            now = key()
            self._things[name] = (now, make())
        return self._things[name][1]

    def evict_stale(self, name: str, key: Key) -> None:
        """Let go of what lies under `name` unless it was made for this key, which it will be asked for."""
        if name in self._things and self._things[name][0] != key():
            del self._things[name]

    def drop(self, *names: str) -> None:
        """Let go of what lies under these names, or of everything."""
        for name in names or list(self._things):
            self._things.pop(name, None)

    def values(self) -> list[Any]:
        """All that is kept."""
        return [thing for _, thing in self._things.values()]
