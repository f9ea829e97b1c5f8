"""Small batches for tests: building requests, and collecting results."""

from __future__ import annotations

from pathlib import Path

from linfusion_cli.batch.filenames import DEFAULT_TEMPLATE, FilenameTemplate
from linfusion_cli.batch.parsers.job_spec import JobSpec
from linfusion_cli.batch.queue import BuildRequest, JobQueue
from linfusion_cli.batch.results import ResultsLog
from linfusion_cli.batch.runner import BatchRunner, JobFunction
from linfusion_cli.core.events import Observer, ignore_event
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.report import RunReport
from linfusion_cli.settings.request_json import request_to_json
from tests.support.requests import make_request


class ResultCollector:
    """Collect the results that a BatchRunner reports."""

    def __init__(self) -> None:
        self.results = []

    def __call__(self, result, report) -> None:
        self.results.append(result)

    def status(self) -> dict[int, str]:
        """Return the status of each job by its line."""
        return {result.line: result.status for result in self.results}


def builder(**defaults: object) -> BuildRequest:
    """Return a function that builds small requests with `defaults`, which the values of a job override."""

    def build(values):
        small = {"prompt": "a hill", "size": Size(64, 64), "output": Path("x.png"), "model": "demo", "steps": (1,)}
        return {}, make_request(**small | {"format": "png"} | defaults | values)

    return build


def job_specs(count: int, **values: object) -> list[JobSpec]:
    """Return jobs with `values` and different prompts."""
    return [JobSpec(line, {"prompt": f"hill {line}"} | values) for line in range(1, count + 1)]


def run_batch(
    folder: Path,
    jobs: list[JobSpec],
    execute: JobFunction,
    observer: Observer = ignore_event,
    build: BuildRequest | None = None,
    stop_on_error: bool = False,
    **queue_options: object,
) -> tuple[ResultCollector, BatchRunner]:
    """Run `jobs` in `folder`; return the collected results and the runner."""
    queue = JobQueue(build or builder(), folder, FilenameTemplate.parse(DEFAULT_TEMPLATE), **queue_options)
    collector = ResultCollector()
    results_log = ResultsLog(folder / queue.shard.results_name)
    runner = BatchRunner(execute, results_log, observer, collector, lambda error: f"bug {error}", stop_on_error)
    runner.run(queue.build_jobs(jobs), "jobs.jsonl")
    return collector, runner


def failing(errors: dict[str, BaseException], ran: list | None = None) -> JobFunction:
    """Return a job function without images: raise the error in `errors` for a prompt, and add requests to `ran`."""

    def execute(request, origins, observer, model_cache):
        if ran is not None:
            ran.append(request)
        if request.prompt in errors:
            raise errors[request.prompt]
        return RunReport(request_to_json(request), {}, {}, {}, {}, output=str(request.execution.output))

    return execute
