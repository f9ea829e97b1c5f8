"""Measures a run stage by stage and tells its observer; memory is freed where one stage ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from linfusion_cli.core.events import Notice, Observer, Planned, StageAdvanced, StageFinished, StageStarted
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.report import StageReport
from linfusion_cli.hardware.device import PeakMemory, free_memory

if TYPE_CHECKING:
    import torch

    from linfusion_cli.planning.estimate import ResourceEstimate


class StageTimer:
    """A stretch of work that is going on: its clock, which can be paused, and how far it is.

    `is_cut_short` says that it ends before all its units are done.
    """

    def __init__(self, observer: Observer):
        self._observer = observer
        self.done, self.is_cut_short = 0, False
        self._started = time.perf_counter()
        self._paused_sec = 0.0

    def advance(self, done: int) -> None:
        """Say that `done` of the stage's units are finished."""
        self.done = done
        self._observer(StageAdvanced(done))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within belongs to another stage: a generator's consumer, say."""
        began = time.perf_counter()
        yield
        self._paused_sec += time.perf_counter() - began

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started - self._paused_sec


class RunRecorder:
    """Collects the StageReports of one run; `device` is set once it is known."""

    def __init__(self, observer: Observer):
        self.stages: list[StageReport] = []
        self.device: torch.device | None = None
        self._observer = observer
        self._said: set[str] = set()
        self._repeats = False

    def planned(self, need: ResourceEstimate, device_bytes: int | None) -> None:
        """Say what the run will take, before it starts."""
        self._observer(Planned(need.seconds, need.host_bytes, device_bytes))

    def notice(self, text: str) -> None:
        if not (self._repeats and text in self._said):
            self._observer(Notice(text))
        self._said.add(text)

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Within, work is done again: what was said of it is not said twice."""
        self._repeats = True
        try:
            yield
        finally:
            self._repeats = False

    @contextmanager
    def stage(
        self,
        name: str,
        kind: str,
        size: Size | None,
        total: int,
        unit: str,
        spent_sec: float = 0.0,
        planned: ResourceEstimate | None = None,
        done: int = 0,
    ) -> Iterator[StageTimer]:
        """Time and measure what happens within: `total` units of it, which the Stage is told of.

        `spent_sec` is what the stage took before, in pieces between others; an earlier run has `done` some units.
        """
        free_memory(self.device)
        peak = PeakMemory(self.device)
        self._observer(StageStarted(name, size, total, unit))
        stage = StageTimer(self._observer)
        if done:
            stage.advance(done)
        yield stage
        end = stage.done if stage.is_cut_short else total
        steps = end - done if unit == "steps" else None
        seconds = stage.seconds + spent_sec
        measured = StageReport(name, kind, size, seconds, steps, peak.host_bytes(), peak.device_bytes())
        self.stages.append(measured if planned is None else with_plan(measured, planned, (end - done) / total))
        self._observer(StageFinished(seconds, stage.is_cut_short))


def with_plan(measured: StageReport, planned: ResourceEstimate, share: float) -> StageReport:
    """What was measured, with what had been planned beside it, for the `share` of it that was done."""
    device = planned.device_bytes if measured.peak_device_bytes is not None else None
    return replace(
        measured,
        planned_seconds=planned.seconds * share,
        planned_host_bytes=planned.host_bytes,
        planned_device_bytes=device,
    )
