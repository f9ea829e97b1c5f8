"""Plain text lists: one prompt per line."""

from __future__ import annotations

from collections.abc import Iterator

from linfusion_cli.batch.parsers.job_spec import JobSpec, parse_job
from linfusion_cli.batch.parsers.line_reader import Line


def read_text(lines: Iterator[Line]) -> Iterator[JobSpec]:
    """Yield a job for each line, except for blank lines and comments, which start with #."""
    for line in lines:
        text = line.text.strip()
        if line.problem or (text and not text.startswith("#")):
            yield parse_job(line, lambda text: {"prompt": text.strip()})
