"""Batches in small: what makes requests of jobs, and who listens."""

from __future__ import annotations

from pathlib import Path

from linfusion_cli.batch.filenames import TEMPLATE, FilenameTemplate
from linfusion_cli.batch.parsers.parsers import JobSpec
from linfusion_cli.batch.queue import Build, JobQueue
from linfusion_cli.batch.results import ResultsLog
from linfusion_cli.batch.runner import BatchRunner, Make
from linfusion_cli.core.events import Observer, ignore_event
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.report import RunReport
from linfusion_cli.settings.request import GenerateRequest


class Told:
    """Whoever hears of outcomes."""

    def __init__(self) -> None:
        self.outcomes = []

    def __call__(self, outcome, report) -> None:
        self.outcomes.append(outcome)

    def status(self) -> dict[int, str]:
        """By line."""
        return {outcome.line: outcome.status for outcome in self.outcomes}


def builder(**defaults: object) -> Build:
    """What makes a request of a job that says this, small unless it says otherwise."""

    def build(values):
        standing = {"prompt": "a hill", "size": Size(64, 64), "output": Path("x.png"), "model": "demo", "steps": (1,)}
        return {}, GenerateRequest(**standing | {"format": "png"} | defaults | values)

    return build


def entries(count: int, **values: object) -> list[JobSpec]:
    """Jobs that say this, each with a prompt of its own."""
    return [JobSpec(line, {"prompt": f"hill {line}"} | values) for line in range(1, count + 1)]


def carried_out(
    folder: Path,
    jobs: list[JobSpec],
    make: Make,
    observer: Observer = ignore_event,
    build: Build | None = None,
    stop_on_error: bool = False,
    **listed: object,
) -> tuple[Told, BatchRunner]:
    """What was told of these jobs, carried out in `folder`, and the batch."""
    listing = JobQueue(build or builder(), folder, FilenameTemplate.parse(TEMPLATE), **listed)
    told = Told()
    record = ResultsLog(folder / listing.shard.record)
    batch = BatchRunner(make, record, observer, told, lambda error: f"bug {error}", stop_on_error)
    batch.run(listing.jobs(jobs), "jobs.jsonl")
    return told, batch


def failing(errors: dict[str, BaseException], ran: list | None = None) -> Make:
    """Makes nothing, and raises what `errors` have for a prompt; `ran` gets every request."""

    def make(request, origins, observer, model_cache):
        if ran is not None:
            ran.append(request)
        if request.prompt in errors:
            raise errors[request.prompt]
        return RunReport(request.to_json(), {}, {}, {}, output=str(request.output))

    return make
