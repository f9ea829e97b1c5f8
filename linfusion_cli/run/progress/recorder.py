"""Measure the stages of a run and report them to the observer. Unused memory is freed between stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from linfusion_cli.core.events import Notice, Observer, Planned, StageAdvanced, StageFinished, StageKind, StageStarted
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.report import StageReport
from linfusion_cli.hardware.peak import PeakMemory, release_memory

if TYPE_CHECKING:
    import torch

    from linfusion_cli.planning.estimate import ResourceEstimate


class StageTimer:
    """The clock and the progress of one running stage.

    Set `is_cut_short` if the stage ends before all its units are done.
    """

    def __init__(self, observer: Observer):
        self._observer = observer
        self.done, self.is_cut_short = 0, False
        self._started = time.perf_counter()
        self._paused_sec = 0.0

    def advance(self, done: int) -> None:
        """Report that `done` units of the stage are finished."""
        self.done = done
        self._observer(StageAdvanced(done))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time spent in this block: it belongs to another stage, for example a generator's consumer."""
        paused_at = time.perf_counter()
        yield
        self._paused_sec += time.perf_counter() - paused_at

    @property
    def seconds(self) -> float:
        """The time since the start of the stage, without pauses."""
        return time.perf_counter() - self._started - self._paused_sec


class RunningStage(NamedTuple):
    """A stage that has started: its kind, its number of units, its clock, and the estimate of the plan."""

    kind: StageKind
    total: int
    timer: StageTimer
    planned: ResourceEstimate | None


class RunRecorder:
    """Collects the StageReports of one run and sends its events to an observer. Set `device` once it is known."""

    def __init__(self, observer: Observer):
        self.stages: list[StageReport] = []
        self.device: torch.device | None = None
        self.running: RunningStage | None = None
        self._observer = observer
        self._sent_notices: set[str] = set()
        self._suppresses_repeats = False

    def report_plan(self, estimate: ResourceEstimate, device_bytes: int | None) -> None:
        """Report the expected time and memory of the run."""
        self._observer(Planned(estimate.seconds, estimate.host_bytes, device_bytes))

    def notify(self, text: str) -> None:
        """Send a notice, unless it is a repeated one and those are suppressed."""
        if not (self._suppresses_repeats and text in self._sent_notices):
            self._observer(Notice(text))
        self._sent_notices.add(text)

    @contextmanager
    def suppress_repeated_notices(self) -> Iterator[None]:
        """Do not send a notice again in this block: it repeats work that has already been reported."""
        self._suppresses_repeats = True
        try:
            yield
        finally:
            self._suppresses_repeats = False

    @contextmanager
    def stage(
        self,
        kind: StageKind,
        size: Size | None,
        total: int,
        unit: str,
        spent_sec: float = 0.0,
        planned: ResourceEstimate | None = None,
        done: int = 0,
        phase: int | None = None,
        phase_name: str | None = None,
    ) -> Iterator[StageTimer]:
        """Measure the time and peak memory of this block as a stage of `total` units, and add its StageReport.

        `spent_sec` is time that the stage has already taken in parts during other stages. An earlier run has finished
        the first `done` units.
        """
        release_memory(self.device)
        peak = PeakMemory(self.device)
        stage = StageTimer(self._observer)
        self.running = RunningStage(kind, total, stage, planned)
        self._observer(StageStarted(kind, phase_name, size, total, unit))
        if done:
            stage.advance(done)
        yield stage
        end = stage.done if stage.is_cut_short else total
        steps = end - done if unit == "steps" else None
        seconds = stage.seconds + spent_sec
        peaks = peak.host_bytes(), peak.device_bytes()
        measured = StageReport(kind, phase_name, size, seconds, steps, *peaks, phase=phase)
        self.running = None
        self.stages.append(measured if planned is None else add_estimate(measured, planned, (end - done) / total))
        self._observer(StageFinished(seconds, stage.is_cut_short))


def add_estimate(measured: StageReport, planned: ResourceEstimate, share: float) -> StageReport:
    """Return the report with the planned figures added. `share` of the planned work was done."""
    device = planned.device_bytes if measured.peak_device_bytes is not None else None
    return replace(
        measured,
        planned_seconds=planned.seconds * share,
        planned_host_bytes=planned.host_bytes,
        planned_device_bytes=device,
    )
