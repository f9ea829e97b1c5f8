"""Events that a run sends to an observer: notices, the plan, and the progress of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from linfusion_cli.core.geometry import Size

# The kinds of stages, in the order of a run. Events, plans, reports and checkpoints use no other names.
# resolve: find and hash the files. plan: choose strategies. load: read weights. start: encode the image that a phase
# starts from. write: complete the file.
StageKind = Literal["resolve", "plan", "load", "encode_prompts", "start", "denoise", "decode", "write"]


class StageKey(NamedTuple):
    """Identifies a planned stage; `phase` is the index of its phase."""

    kind: StageKind
    phase: int


@dataclass(frozen=True)
class Notice:
    """One sentence for the user: an automatic choice or a warning."""

    text: str


@dataclass(frozen=True)
class JobStarted:
    """A batch starts job `number` of `count`; `name` is its output file."""

    number: int
    count: int
    name: str


@dataclass(frozen=True)
class Planned:
    """The estimate for the whole run, sent before it starts. `device_bytes` is None without a GPU."""

    seconds: float
    host_bytes: int
    device_bytes: int | None


@dataclass(frozen=True)
class StageStarted:
    """A stage of `total` units starts; `name` is e.g. "base", "2x" or "decode", `unit` is "steps" or "rows"."""

    name: str
    kind: StageKind
    size: Size | None
    total: int
    unit: str


@dataclass(frozen=True)
class StageAdvanced:
    """`done` units of the stage are finished."""

    done: int


@dataclass(frozen=True)
class StageFinished:
    """The stage ends after `seconds`; if it is `cut_short`, another stage continues its work."""

    seconds: float
    cut_short: bool = False


Event = Notice | JobStarted | Planned | StageStarted | StageAdvanced | StageFinished


class Observer(Protocol):
    """A callable that receives the events of a run."""

    def __call__(self, event: Event) -> None:
        """Handle one event."""


def ignore_event(event: Event) -> None:
    """Do nothing: the default observer."""
