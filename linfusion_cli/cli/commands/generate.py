"""`linfusion generate`: options -> request, run, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from linfusion_cli.cli.output import log_file as output_log_file
from linfusion_cli.cli.output import render
from linfusion_cli.cli.parsing import options
from linfusion_cli.cli.parsing.build_request import keep_to, quieten_hub, read_request
from linfusion_cli.core.events import Observer
from linfusion_cli.core.fs import check_distinct
from linfusion_cli.core.report import RunReport
from linfusion_cli.settings.request import GenerateRequest, ImageRequest

Job = Callable[[Any, Mapping[str, str], Observer], RunReport]
Asked = tuple[dict[str, str], ImageRequest, Job]  # where each setting came from, the request, who carries it out


@options.takes_a_request(options.of_generate)
def command(
    given: dict[str, Any],
    report: options.Report = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    log_file: options.LogFile = None,
    time_limit: options.TimeLimit = None,
) -> None:
    """Make a picture from a prompt and write it to a file."""
    from linfusion_cli.run.pipeline import generate  # numpy and more: not for --help to wait for

    run(partial(asked, given, GenerateRequest, generate), given, report, as_json, quiet, log_file, time_limit)


def asked(given: dict[str, Any], kind: type[ImageRequest], job: Job, observer: Observer) -> Asked:
    """The request that `given` options make, and the job that carries it out."""
    return *read_request(given, observer, kind), job


def run(
    ask: Callable[[Observer], Asked],
    given: Mapping[str, Any],
    report: Path | None,
    as_json: bool,
    quiet: bool,
    log_file: Path | None,
    time_limit: str | None,
) -> None:
    """Carry out what `ask` makes of the `given` options, before whoever watches, and say what came of it."""
    quieten_hub(bool(given["download"]), quiet)
    keep_to(time_limit)
    with render.watching(quiet, log_file) as observer:
        origins, request, job = ask(observer)
        files = {"--output": request.output, "--preview": request.preview, "--keep-latents": request.keep_latents}
        check_distinct(files | {"--report": report, "--log-file": log_file})
        output_log_file.write(f"output: {request.output}")
        with report_file(report, request.overwrite) as save:
            result = job(request, origins, observer)
            save(result)
    render.show_report(result, quiet)
    render.answer(as_text(result) if as_json else result.output)


@contextmanager
def report_file(path: Path | None, overwrite: bool) -> Iterator[Callable[[RunReport], None]]:
    """Holds the report's file from the beginning, so that a path that refuses does so before hours of work."""
    from linfusion_cli.images import AtomicFile

    if path is None:
        yield lambda report: None
        return
    with AtomicFile(path, overwrite) as file:

        def save(report: RunReport) -> None:
            file.write(as_text(report).encode() + b"\n")
            file.commit()

        yield save


def as_text(report: RunReport) -> str:
    """The report as JSON for a person's eyes."""
    return json.dumps(report.to_json(), indent=2)
