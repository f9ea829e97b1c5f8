"""Run the jobs of a batch one after the other, and log each result. A failed job does not stop the others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from linfusion_cli.batch.parsers.job_spec import MAX_PROBLEM_CHARS
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
from linfusion_cli.hardware.torch_errors import translate_error
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.run.inputs.source_image import resolve_source_image
from linfusion_cli.run.outputs.existing import find_existing
from linfusion_cli.run.pipeline import run_pipeline
from linfusion_cli.run.progress.recorder import RunRecorder
from linfusion_cli.settings.request import Request

MAX_FAILURES = 10_000  # kept in memory until the end; the results file has all of them

# Run a job and return its report; None if a dry run only plans it.
JobFunction = Callable[[Request, Mapping[str, str], Observer, ModelCache], RunReport | None]


def run_job(request: Request, origins: Mapping[str, str], observer: Observer, model_cache: ModelCache) -> RunReport:
    """Make the image of a job unless it is already complete."""
    request, image = resolve_source_image(request)
    return run_pipeline(request, image, origins, observer, model_cache, keep_complete=True)


def dry_run_job(
    request: Request, origins: Mapping[str, str], observer: Observer, model_cache: ModelCache
) -> RunReport | None:
    """Return the report of an image that is already complete; None if it would be made.

    Raises CannotCreateOutput if the output is another file.
    """
    request, image = resolve_source_image(request)
    report = find_existing(request, image, RunRecorder(observer), model_cache, keep_complete=True).report
    if report is None and os.path.lexists(request.execution.output) and not request.execution.overwrite:
        reason = f"{request.execution.output} exists and is another image."
        raise CannotCreateOutput(reason, "Add --overwrite, or choose another name.")
    return report


@dataclass
class BatchRunner:
    """Run jobs and collect their results; `run` can be called for several lists, as with --watch.

    execute: run one job.
    results_log: the results file; None for a dry run.
    on_result: called with each result, and the report of a complete image.
    describe_bug: return a sentence on an unexpected exception.
    stop_on_error: stop after the first job that fails.
    """

    execute: JobFunction
    results_log: ResultsLog | None
    observer: Observer
    on_result: Callable[[JobResult, RunReport | None], None]
    describe_bug: Callable[[Exception], str]
    stop_on_error: bool = False
    summary: Summary = field(default_factory=Summary)
    failures: list[JobResult] = field(default_factory=list)
    _model_cache: ModelCache = field(default_factory=ModelCache)

    def run(self, jobs: list[Job], list_name: str) -> Summary:
        """Run the jobs of a list and return a summary of this list.

        Raises Stopped, or WriteFailed if the results file cannot be written.
        """
        summary = Summary()
        for number, job in enumerate(jobs, 1):
            if job.name:
                self.observer(JobStarted(number, len(jobs), job.name))
            result, report = self._run_job(job, list_name)
            if self.results_log is not None:
                self.results_log.append(result)
            summary.add(result)
            self.summary.add(result)
            if result.status == "failed" and len(self.failures) < MAX_FAILURES:
                self.failures.append(result)
            self.on_result(result, report)
            if self.stop_on_error and result.status == "failed":
                break
        return summary

    def _run_job(self, job: Job, list_name: str) -> tuple[JobResult, RunReport | None]:
        started, report = time.monotonic(), None
        status: Status = "failed"
        exit_code, message = 0, None
        try:
            report = self._execute(job)
            status = "planned" if report is None else "skipped" if report.already_complete else "done"
        except LinfusionError as error:
            if isinstance(error, OutOfMemory | DeviceFailed):
                self._model_cache.evict()  # to free memory, or because the device cannot be read any more
            status = "locked" if isinstance(error, TemporaryFailure) else "failed"
            exit_code, message = error.exit_code, str(error)
        except Exception as error:  # noqa: BLE001 - a bug in one job must not stop the others
            self._model_cache.evict()  # the models may be in an undefined state
            exit_code, message = self._describe_error(error)
        result = JobResult(
            list=list_name,
            index=job.index,
            line=job.line,
            status=status,
            exit_code=exit_code,
            error=None if message is None else shorten(message, MAX_PROBLEM_CHARS),
            output=None if job.output is None else str(job.output),
            seconds=round(time.monotonic() - started, 3),
            peak_host_bytes=report and report.peak_host_bytes,
            peak_device_bytes=report and report.peak_device_bytes,
            prompt=job.prompt or None,
            seed=job.seed,
            time=datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        return result, report

    def _execute(self, job: Job) -> RunReport | None:
        """Return the report of the job; None if it is only planned. Raises UsageError for an invalid job."""
        if job.problem:
            raise UsageError(job.problem)
        origins, request = job.build_request()
        if self.results_log is not None:
            make_folder(request.execution.output.parent)
        return self.execute(request, origins, self.observer, self._model_cache)

    def _describe_error(self, error: Exception) -> tuple[int, str]:
        """Return the exit code and the message of an error that is not a LinfusionError."""
        known = translate_error(error)
        return (EXIT_BUG, self.describe_bug(error)) if known is None else (known.exit_code, str(known))


def make_folder(folder: Path) -> None:
    """Create the folder of an image if it is missing; raise CannotCreateOutput."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"The folder {folder} cannot be created ({error.strerror})."
        raise CannotCreateOutput(reason, "Choose another one.") from error
