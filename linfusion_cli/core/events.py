"""What a run tells the outside while it works. Jobs send events; the command line, a test or nobody listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from linfusion_cli.core.geometry import Size


@dataclass(frozen=True)
class Notice:
    """One sentence a person should read: a choice made for them, or a warning."""

    text: str


@dataclass(frozen=True)
class JobStarted:
    """A batch begins with the `number`-th of its `count` jobs, whose file is `name`."""

    number: int
    count: int
    name: str


@dataclass(frozen=True)
class Planned:
    """What the whole run is expected to take: said before it starts. Bytes of the card are None without one."""

    seconds: float
    host_bytes: int
    device_bytes: int | None


@dataclass(frozen=True)
class StageStarted:
    """A stretch of work of `total` units begins: `name` is "base", "2x", "decode" … and `unit` "steps" or "rows"."""

    name: str
    size: Size | None
    total: int
    unit: str


@dataclass(frozen=True)
class StageAdvanced:
    """`done` of the stage's units are finished."""

    done: int


@dataclass(frozen=True)
class StageFinished:
    """The stage is over, after `seconds`; one that is `cut_short` goes on as another stage."""

    seconds: float
    cut_short: bool = False


Event = Notice | JobStarted | Planned | StageStarted | StageAdvanced | StageFinished


class Observer(Protocol):
    """Whoever wants to know how a run goes."""

    def __call__(self, event: Event) -> None: ...


def ignore_event(event: Event) -> None:
    """An observer for runs that no one watches."""
