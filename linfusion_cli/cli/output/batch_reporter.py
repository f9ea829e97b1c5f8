"""Show the results of a batch: output files on stdout as they are completed, or one JSON object at the end."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linfusion_cli.cli.output.log_file import write_log
from linfusion_cli.cli.output.report_file import write_job_report
from linfusion_cli.cli.output.streams import emit_result, log
from linfusion_cli.core.errors import LinfusionError
from linfusion_cli.core.events import Notice, Observer

if TYPE_CHECKING:
    from linfusion_cli.batch.results import JobResult, Summary
    from linfusion_cli.batch.runner import BatchRunner
    from linfusion_cli.core.report import RunReport

SCHEMA = 1  # of the JSON summary
MAX_LISTED_FAILURES = 20


@dataclass
class BatchReporter:
    """Shows each job's result and the summary of a batch, and writes the reports of its images."""

    observer: Observer
    as_json: bool
    reports: bool
    source: str
    is_dry_run: bool
    is_quiet: bool
    planned_outputs: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, result: JobResult, report: RunReport | None) -> None:
        """Show the result of a job."""
        if report is not None and self.reports and not self.is_dry_run and result.output is not None:
            self._write_report(Path(result.output), report)
        if result.status in ("failed", "locked"):
            self.observer(Notice(f"line {result.line} {result.status}: {result.error}"))
        elif self.is_dry_run and self.as_json:
            self.planned_outputs.append({"line": result.line, "status": result.status, "output": result.output})
        elif not self.as_json:
            emit_result(f"{result.status}\t{result.output}" if self.is_dry_run else str(result.output))

    def _write_report(self, output: Path, report: RunReport) -> None:
        """Write a report; if that fails, warn only, because the image itself is complete."""
        try:
            write_job_report(output, report)
        except LinfusionError as error:
            self.observer(Notice(str(error)))

    def show_summary(self, batch: BatchRunner) -> None:
        """Show the number of jobs per status and the first failures."""
        log_or_write = log if not self.is_quiet or batch.summary.exit_code else write_log
        results_file = None if batch.results_log is None else str(batch.results_log.path)
        for line in (format_counts(batch.summary, results_file), *format_failures(batch.failures)):
            log_or_write(line)
        if self.as_json:
            emit_result(json.dumps(self._summary_to_json(batch, results_file), indent=2))

    def _summary_to_json(self, batch: BatchRunner, results_file: str | None) -> dict[str, Any]:
        values = {"schema": SCHEMA, "jobs": self.source} | asdict(batch.summary)
        values |= {"results": results_file, "failures": [result.to_json() for result in batch.failures]}
        return values | ({"outputs": self.planned_outputs} if self.is_dry_run else {})


def format_counts(summary: Summary, results_file: str | None) -> str:
    """Return the number of jobs per status, and the file of all results, as one line."""
    counts = ", ".join(f"{count} {status}" for status, count in asdict(summary).items() if count) or "no job finished"
    return f"batch: {counts}" if results_file is None else f"batch: {counts}. All results: {results_file}"


def format_failures(failures: list[JobResult]) -> list[str]:
    """Return one line for each of the first failures, and the number of the others."""
    lines = [f"  {failure.list}:{failure.line}: {failure.error}" for failure in failures[:MAX_LISTED_FAILURES]]
    hidden_count = len(failures) - MAX_LISTED_FAILURES
    return [*lines, f"  and {hidden_count} more"] if hidden_count > 0 else lines
