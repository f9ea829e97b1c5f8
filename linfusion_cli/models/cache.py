"""Cache of loaded networks between the jobs of a batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from linfusion_cli.models.files.digest import FileIdentity

Value = TypeVar("Value")
ComputeKey = Callable[[], Hashable]  # called only if the cache is enabled


class ModelCache:
    """Cache with one entry per name; an entry with another key is evicted before its replacement is built.

    A disabled cache builds every value on every call: single runs use it. `digests` maps file identities to the
    SHA-256 of files that have been hashed.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.digests: dict[FileIdentity, str] = {}
        self._entries: dict[str, tuple[Hashable, Any]] = {}

    def get(self, name: str, key: ComputeKey, build: Callable[[], Value]) -> Value:
        """Return the entry `name` if it was built for this key; otherwise build and store it."""
        if not self.enabled:
            return build()
        self.evict_stale(name, key)
        if name not in self._entries:
            current_key = key()
            self._entries[name] = (current_key, build())
        return self._entries[name][1]

    def evict_stale(self, name: str, key: ComputeKey) -> None:
        """Evict the entry `name` if its key differs from `key`."""
        if name in self._entries and self._entries[name][0] != key():
            del self._entries[name]

    def evict(self, *names: str) -> None:
        """Evict the entries with these names, or all entries if no name is given."""
        for name in names or list(self._entries):
            self._entries.pop(name, None)

    def values(self) -> list[Any]:
        """Return all cached values."""
        return [value for _, value in self._entries.values()]
