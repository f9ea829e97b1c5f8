"""Write the report of a run to a JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from linfusion_cli.core.report import RunReport


def format_report(report: RunReport) -> str:
    """Return the report as indented JSON."""
    return json.dumps(report.to_json(), indent=2)


@contextmanager
def open_report_file(path: Path | None, overwrite: bool) -> Iterator[Callable[[RunReport], None]]:
    """Open the file of a report -> a function that writes the report to it; without a path, it does nothing.

    The file is opened before the run: an invalid path must be an error before hours of work, not after.
    """
    from linfusion_cli.images import AtomicFile  # numpy and more: slow to import, not needed for --help

    if path is None:
        yield lambda report: None
        return
    with AtomicFile(path, overwrite) as file:

        def save(report: RunReport) -> None:
            file.write(format_report(report).encode() + b"\n")
            file.commit()

        yield save


def is_report(path: Path) -> bool:
    """Return whether the file at `path` is the report of a run."""
    try:
        return {"schema", "request", "stages"} <= json.loads(path.read_bytes()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def write_job_report(output: Path, report: RunReport) -> None:
    """Write the report of a batch's job to a file next to its image, in place of an older report.

    If the image was complete before and has a report, that one is kept. Raises CannotCreateOutput if another file has
    the name.
    """
    from linfusion_cli.batch.queue import REPORT_SUFFIX

    path = output.with_name(output.name + REPORT_SUFFIX)
    replaces_report = is_report(path)
    if report.already_complete and replaces_report:
        return
    with open_report_file(path, overwrite=replaces_report) as save:
        save(report)
