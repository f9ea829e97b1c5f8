"""Events that a run sends to an observer: notices, the plan, and the progress of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from linfusion_cli.core.geometry import Size

# The kinds of stages, in the order of a run. Events, plans, reports, checkpoints and logs use no other names.
# resolve: find and hash the files. plan: choose strategies. load: read weights. start: read and encode the images that
# a phase starts from. write: complete the file.
StageKind = Literal["resolve", "plan", "load", "encode_prompts", "start", "denoise", "decode", "write"]


class StageKey(NamedTuple):
    """Identifies a planned stage; `phase` is the index of its phase."""

    kind: StageKind
    phase: int


def format_stage(kind: StageKind, phase_name: str | None) -> str:
    """Return the text for a stage in logs and tables: its kind and the name of its phase, such as "denoise 2x"."""
    return kind if phase_name is None else f"{kind} {phase_name}"


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
    """A stage of `total` units starts; `unit` is "steps" or "rows", for example.

    `phase_name` is "base" or "2x", for example; None for a stage of the whole run.
    """

    kind: StageKind
    phase_name: str | None
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
