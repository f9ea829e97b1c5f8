"""Run a command that writes an image: generate, upscale and decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linfusion_cli.cli.output.log_file import write_log
from linfusion_cli.cli.output.progress import observe_run
from linfusion_cli.cli.output.report_file import format_report, open_report_file
from linfusion_cli.cli.output.report_table import show_report
from linfusion_cli.cli.output.streams import emit_result
from linfusion_cli.cli.parsing.build_request import configure_hub, read_request, start_time_limit
from linfusion_cli.core.events import Observer
from linfusion_cli.core.fs import check_distinct
from linfusion_cli.core.report import RunReport
from linfusion_cli.settings.request import ImageRequest

Job = Callable[[Any, Mapping[str, str], Observer], RunReport]  # request, origins of its settings, observer


@dataclass(frozen=True)
class RunOptions:
    """The options of a run that are not part of its request."""

    report: Path | None
    as_json: bool
    quiet: bool
    log_file: Path | None
    time_limit: str | None


@dataclass(frozen=True)
class PreparedRun:
    """A request, the origin of each of its settings, and the function that executes it."""

    origins: dict[str, str]
    request: ImageRequest
    job: Job


def run_request(given: dict[str, Any], kind: type[ImageRequest], job: Job, options: RunOptions) -> None:
    """Build a request of this kind from the `given` options, run `job` with it, and show the result."""

    def prepare(observer: Observer) -> PreparedRun:
        return PreparedRun(*read_request(given, observer, kind), job)

    run_command(prepare, bool(given["download"]), options)


def run_command(prepare: Callable[[Observer], PreparedRun], download: bool, options: RunOptions) -> None:
    """Prepare and execute a run, write its report, and show the result."""
    configure_hub(download, options.quiet)
    start_time_limit(options.time_limit)
    with observe_run(options.quiet, options.log_file) as observer:
        prepared = prepare(observer)
        request = prepared.request
        check_output_files(request, options)
        write_log(f"output: {request.output}")
        with open_report_file(options.report, request.overwrite) as save_report:
            report = prepared.job(request, prepared.origins, observer)
            save_report(report)
    show_report(report, options.quiet)
    emit_result(format_report(report) if options.as_json else str(report.output))


def check_output_files(request: ImageRequest, options: RunOptions) -> None:
    """Raise UsageError if two output files of the run are the same file."""
    files = {"--output": request.output, "--preview": request.preview, "--keep-latents": request.keep_latents}
    check_distinct(files | {"--report": options.report, "--log-file": options.log_file})
