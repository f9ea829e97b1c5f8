"""Complete the report of a run after its output is written."""

from __future__ import annotations

import time
from contextlib import suppress

from linfusion_cli import images
from linfusion_cli.core.report import RunReport
from linfusion_cli.settings.request import Request


def complete_report(report: RunReport, request: Request, started: float) -> RunReport:
    """Add the output and the total time to the report of a run that started at `started`; return the report."""
    report.output, report.size = str(request.execution.output), request.size
    report.format = images.resolve_format(request.execution.output, request.format)
    with suppress(OSError):  # another program may have moved the file already
        report.file_bytes = request.execution.output.stat().st_size
    report.total_seconds = time.perf_counter() - started
    return report
