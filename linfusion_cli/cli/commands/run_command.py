"""Run a command that writes an image: generate, upscale and decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from linfusion_cli.cli.output.log_file import write_log
from linfusion_cli.cli.output.progress import observe_run
from linfusion_cli.cli.output.report_file import format_report, open_report_file
from linfusion_cli.cli.output.report_table import show_report
from linfusion_cli.cli.output.streams import emit_result
from linfusion_cli.cli.parsing.build_request import (
    configure_hub,
    read_command_options,
    read_request,
    start_time_limit,
)
from linfusion_cli.core.events import Observer
from linfusion_cli.core.fs import check_distinct
from linfusion_cli.core.report import RunReport
from linfusion_cli.settings.command_options import CommandOptions
from linfusion_cli.settings.request import Request

Job = Callable[[Any, Mapping[str, str], Observer], RunReport]  # request, origins of its settings, observer


@dataclass(frozen=True)
class PreparedRun:
    """A request, the origin of each of its settings, and the function that executes it."""

    origins: dict[str, str]
    request: Request
    job: Job


def run_request(given: Mapping[str, Any], job: Job) -> None:
    """Build a request from the `given` options, run `job` with it, and show the result."""

    def prepare(observer: Observer) -> PreparedRun:
        return PreparedRun(*read_request(given, observer), job)

    run_command(prepare, given)


def run_command(prepare: Callable[[Observer], PreparedRun], given: Mapping[str, Any]) -> None:
    """Prepare and execute a run, write its report, and show the result."""
    options = read_command_options(given)
    configure_hub(bool(given["download"]), options.quiet)
    start_time_limit(options.time_limit)
    with observe_run(options.quiet, options.log_file) as observer:
        prepared = prepare(observer)
        request = prepared.request
        check_output_files(request, options)
        write_log(f"output: {request.execution.output}")
        with open_report_file(options.report, request.execution.overwrite) as save_report:
            report = prepared.job(request, prepared.origins, observer)
            save_report(report)
    show_report(report, options.quiet)
    emit_result(format_report(report) if options.json else str(report.output))


def check_output_files(request: Request, options: CommandOptions) -> None:
    """Raise UsageError if two output files of the run are the same file."""
    check_distinct(request.execution.files | {"--report": options.report, "--log-file": options.log_file})
