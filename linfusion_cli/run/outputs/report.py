"""Complete the report of a run whose output is written."""

from __future__ import annotations

import time
from contextlib import suppress

from linfusion_cli import images
from linfusion_cli.core.report import RunReport
from linfusion_cli.settings.request import ImageRequest


def complete_report(report: RunReport, request: ImageRequest, started: float) -> RunReport:
    """The report of a run that began at `started`, whose file is complete."""
    report.output, report.size = str(request.output), request.size
    report.format = images.format_for(request.output, request.format)
    with suppress(OSError):  # whoever waited for the file may have moved it already
        report.file_bytes = request.output.stat().st_size
    report.total_seconds = time.perf_counter() - started
    return report
