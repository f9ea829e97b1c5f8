"""Stand-ins for what a run talks to."""

from __future__ import annotations

from linfusion_cli.events import Event


class Listener:
    """An Observer that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]
