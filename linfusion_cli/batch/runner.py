"""The story of a batch: job after job, each recorded when it is over, and none the end of another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from linfusion_cli.batch.parsers.parsers import MAX_PROBLEM_CHARS
from linfusion_cli.batch.queue import Job
from linfusion_cli.batch.results import JobResult, ResultsLog, Status, Summary
from linfusion_cli.core.errors import (
    EXIT_BUG,
    CannotCreateOutput,
    DeviceFailed,
    LinfusionError,
    OutOfMemory,
    TemporaryFailure,
    UsageError,
)
from linfusion_cli.core.events import JobStarted, Observer
from linfusion_cli.core.report import RunReport
from linfusion_cli.core.text import shorten
from linfusion_cli.hardware.failures import explained
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.run.inputs.source_image import open_source
from linfusion_cli.run.outputs.existing import find_existing
from linfusion_cli.run.pipeline import run_pipeline
from linfusion_cli.run.progress.recorder import RunRecorder
from linfusion_cli.settings.request import ImageRequest, UpscaleRequest

MAX_FAILURES = 10_000  # failures that are remembered until the end: the record has all

Make = Callable[[ImageRequest, Mapping[str, str], Observer, ModelCache], RunReport | None]


def run_job(
    request: ImageRequest, origins: Mapping[str, str], observer: Observer, model_cache: ModelCache
) -> RunReport:
    """The picture of a job, unless it is there."""
    request, image = open_source(request) if isinstance(request, UpscaleRequest) else (request, None)
    return run_pipeline(request, image, origins, observer, model_cache, keep_complete=True)


def dry_run_job(
    request: ImageRequest, origins: Mapping[str, str], observer: Observer, model_cache: ModelCache
) -> RunReport | None:
    """As `made`, but what is not there is only told of, with None; raises CannotCreate where another file is."""
    request, image = open_source(request) if isinstance(request, UpscaleRequest) else (request, None)
    found = find_existing(request, image, RunRecorder(observer), model_cache, keep_complete=True).report
    if found is None and os.path.lexists(request.output) and not request.overwrite:
        raise CannotCreateOutput(
            f"{request.output} exists, and is another picture.", "Add --overwrite, or name another."
        )
    return found


@dataclass
class BatchRunner:
    """How jobs are carried out, and what has come of them; lists may follow one another, as with --watch.

    `make` makes a picture, or does not, for a dry run, which has no `record`. `told` gets every outcome, with the
    report of a picture that is complete; `explain` makes a sentence of a bug of ours.
    """

    make: Make
    record: ResultsLog | None
    observer: Observer
    told: Callable[[JobResult, RunReport | None], None]
    explain: Callable[[Exception], str]
    stop_on_error: bool = False
    tally: Summary = field(default_factory=Summary)
    failures: list[JobResult] = field(default_factory=list)
    _model_cache: ModelCache = field(default_factory=ModelCache)

    def run(self, jobs: list[Job], source: str) -> Summary:
        """Carry out the `jobs` of the list `source` -> what came of them; raises Stopped, or WriteFailed of the record.

        With `stop_on_error`, those after the first that fails are left.
        """
        tally = Summary()
        for number, job in enumerate(jobs, 1):
            if job.name:
                self.observer(JobStarted(number, len(jobs), job.name))
            outcome, report = self._carried_out(job, source)
            if self.record is not None:
                self.record.append(outcome)
            for one in (tally, self.tally):
                one.count(outcome)
            if outcome.status == "failed" and len(self.failures) < MAX_FAILURES:
                self.failures.append(outcome)
            self.told(outcome, report)
            if self.stop_on_error and outcome.status == "failed":
                break
        return tally

    def _carried_out(self, job: Job, source: str) -> tuple[JobResult, RunReport | None]:
        began, report = time.monotonic(), None
        status: Status = "failed"
        exit_code, error = 0, None
        try:
            report = self._report(job)
            status = "planned" if report is None else "skipped" if report.already_complete else "done"
        except LinfusionError as wrong:
            if isinstance(wrong, OutOfMemory | DeviceFailed):
                self._model_cache.drop()  # to make room, or as it cannot be read any more
            status = "held" if isinstance(wrong, TemporaryFailure) else "failed"
            exit_code, error = wrong.exit_code, str(wrong)
        except Exception as wrong:  # noqa: BLE001 - what one job meets, a bug of ours too, does not end the others
            self._model_cache.drop()  # in which state it is, nobody knows
            exit_code, error = self._of_a_bug(wrong)
        outcome = JobResult(
            list=source,
            index=job.index,
            line=job.line,
            status=status,
            exit_code=exit_code,
            error=None if error is None else shorten(error, MAX_PROBLEM_CHARS),
            output=None if job.output is None else str(job.output),
            seconds=round(time.monotonic() - began, 3),
            peak_host_bytes=report and report.peak_host_bytes,
            peak_device_bytes=report and report.peak_device_bytes,
            prompt=job.prompt or None,
            seed=job.seed,
            time=datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        return outcome, report

    def _report(self, job: Job) -> RunReport | None:
        """Of the picture of `job`, None where it was not to be made; raises what speaks against it."""
        if job.problem:
            raise UsageError(job.problem)
        origins, request = job.request()
        if self.record is not None:
            make_folder(request.output.parent)
        return self.make(request, origins, self.observer, self._model_cache)

    def _of_a_bug(self, wrong: Exception) -> tuple[int, str]:
        known = explained(wrong)
        return (EXIT_BUG, self.explain(wrong)) if known is None else (known.exit_code, str(known))


def make_folder(folder: Path) -> None:
    """Make the folder of a picture, where it is missing; raises CannotCreate."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotCreateOutput(
            f"The folder {folder} cannot be made ({error.strerror}).", "Name another one."
        ) from error
