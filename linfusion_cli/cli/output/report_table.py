"""Show the report of a run: a table on a terminal, one line elsewhere and in the log."""

from __future__ import annotations

import sys

from linfusion_cli.cli.output.log_file import write_log
from linfusion_cli.cli.output.streams import echo, echo_line, is_terminal, measure_width
from linfusion_cli.cli.output.tables import Column, Table, format_table
from linfusion_cli.core.events import format_stage
from linfusion_cli.core.report import RunReport, StageReport
from linfusion_cli.core.units import format_bytes, format_seconds

COLUMNS = (
    Column("stage", min_width=11),
    Column("size", drop_order=3, is_right_aligned=True),
    Column("steps", drop_order=4, is_right_aligned=True),
    Column("time", is_right_aligned=True),
    Column("planned", drop_order=6, is_right_aligned=True),
    Column("steps/s", drop_order=5, is_right_aligned=True),
    Column("GPU peak", drop_order=1, is_right_aligned=True),
    Column("planned", drop_order=7, is_right_aligned=True),
    Column("host peak", drop_order=2, is_right_aligned=True),
    Column("planned", drop_order=8, is_right_aligned=True),
)


def show_report(report: RunReport, quiet: bool) -> None:
    """Write a table to a terminal, or a line to other streams, unless `quiet`; the log file always gets the line."""
    write_log(format_summary(report))
    if not quiet and is_terminal():
        echo(format_report(report, measure_width(sys.stderr)))
    elif not quiet:
        echo_line(format_summary(report))


def format_summary(report: RunReport) -> str:
    """Return the output file, the total time and the peak memory as one line."""
    peaks = [(report.peak_host_bytes, "host"), (report.peak_device_bytes, "GPU")]
    memory = "".join(f", {format_bytes(peak)} of {kind} memory" for peak, kind in peaks if peak)
    size_and_time = f"{_format_bytes(report.file_bytes)} in {format_seconds(report.total_seconds)}".strip()
    return f"complete: {report.output}, {size_and_time}{memory}"


def format_report(report: RunReport, width: int | None) -> str:
    """Return a table with a row per stage and a row of totals, and a line about the output file."""
    return (
        f"{format_table(build_report_table(report), width)}\nfile: {report.format}, {_format_bytes(report.file_bytes)}"
    )


def build_report_table(report: RunReport) -> Table:
    """Return a table with a row per stage and a row of totals."""
    table = Table(COLUMNS)
    for stage in report.stages:
        table.add_row(*_format_stage(stage))
    device, host = _format_peaks(report)
    table.add_row("total", str(report.size), "", format_seconds(report.total_seconds), "", "", device, "", host)
    return table


def _format_stage(stage: StageReport) -> list[str]:
    rate, planned_sec = stage.steps_per_second, stage.planned_seconds
    device, host = _format_peaks(stage)
    return [
        format_stage(stage.kind, stage.phase_name),
        str(stage.size or ""),
        str(stage.steps or ""),
        format_seconds(stage.seconds),
        "" if planned_sec is None else format_seconds(planned_sec),
        f"{rate:.2f}" if rate else "",
        device,
        _format_bytes(stage.planned_device_bytes),
        host,
        _format_bytes(stage.planned_host_bytes),
    ]


def _format_peaks(measured: StageReport | RunReport) -> list[str]:
    return [_format_bytes(measured.peak_device_bytes), _format_bytes(measured.peak_host_bytes)]


def _format_bytes(count: int | None) -> str:
    return "" if count is None else format_bytes(count)
