"""Turn a list into jobs, in the order in which they run: jobs that share a model run together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linfusion_cli import images
from linfusion_cli.batch.filenames import FilenameRegistry, FilenameTemplate
from linfusion_cli.batch.parsers.job_spec import MAX_PROBLEM_CHARS, JobSpec
from linfusion_cli.batch.shard import Shard
from linfusion_cli.core.errors import LinfusionError
from linfusion_cli.core.text import shorten
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.table import flatten_request, list_reloading_settings

BuildRequest = Callable[[Mapping[str, Any]], tuple[dict[str, str], Request]]

REPORT_SUFFIX = ".json"  # appended to the full name of the image: a.png and a.tif have different reports
MAX_PROMPT_CHARS = 120  # of the prompt in the results file


@dataclass(frozen=True, slots=True)
class Job:
    """An image to make: its index and line in the list, its settings and file names, or its `problem`.

    The request is built when the job runs: only settings are kept for a hundred thousand jobs.
    """

    index: int
    line: int
    values: Mapping[str, Any]
    queue: JobQueue
    name: str = ""
    preview: str = ""
    seed: int | None = None
    group: int = -1
    problem: str = ""

    def build_request(self) -> tuple[dict[str, str], Request]:
        """Return the origin of each setting, and the request."""
        origins, request = self.queue.build_request(self.values)
        assert self.output is not None  # a job without a problem has a name
        files = replace(request.execution, output=self.output, preview=self._build_path(self.preview))
        return origins, replace(request, execution=files)

    @property
    def output(self) -> Path | None:
        """The path of the image; None for a job with a problem."""
        return self._build_path(self.name)

    @property
    def prompt(self) -> str:
        """The start of the prompt."""
        return shorten(self.values.get("prompt", ""), MAX_PROMPT_CHARS)

    def _build_path(self, name: str) -> Path | None:
        return self.queue.folder / name if name else None


@dataclass(frozen=True)
class JobQueue:
    """The settings that turn a list into jobs.

    build_request: build the request of a job from its settings, without file names.
    folder, template: the output folder, and the file names of jobs without an output.
    seeds: every job without a seed runs once with each of these.
    shard: the part of the list that this machine runs.
    reports: True to reserve file names for reports too.
    """

    build_request: BuildRequest
    folder: Path
    template: FilenameTemplate
    seeds: tuple[int, ...] = ()
    shard: Shard = Shard()
    reports: bool = False

    def build_jobs(self, specs: Iterable[JobSpec]) -> list[Job]:
        """Return the jobs of this machine: invalid ones first, then by model, otherwise in the order of the list."""
        filenames = FilenameRegistry(self.folder)
        groups: dict[tuple, int] = {}
        jobs = (self._build_job(index, spec, filenames, groups) for index, spec in self._expand_seeds(specs))
        own_jobs = [job for position, job in enumerate(jobs) if self.shard.contains(position)]
        return sorted(own_jobs, key=lambda job: job.group)

    def _expand_seeds(self, specs: Iterable[JobSpec]) -> Iterator[tuple[int, JobSpec]]:
        """Yield the index in the list, from 1, and the job: once per seed if the job has no seed."""
        for index, spec in enumerate(specs, 1):
            if spec.problem or not self.seeds or "seed" in spec.values:
                yield index, spec
            else:
                for seed in self.seeds:
                    yield index, replace(spec, values=spec.values | {"seed": seed})

    def _build_job(self, index: int, spec: JobSpec, filenames: FilenameRegistry, groups: dict[tuple, int]) -> Job:
        values = {name: value for name, value in spec.values.items() if name not in ("output", "preview")}
        job = Job(index, spec.line, values, self, problem=spec.problem)
        if spec.problem:
            return job
        try:
            _, request = self.build_request(values)
            job = replace(job, seed=request.seed)
            output, preview = self._reserve_files(index, spec, request, filenames)
        except LinfusionError as error:
            return replace(job, problem=shorten(str(error), MAX_PROBLEM_CHARS))
        flat = flatten_request(request)
        model_key = tuple(flat[name] for name in list_reloading_settings())
        return replace(job, name=output, preview=preview, group=groups.setdefault(model_key, len(groups)))

    def _reserve_files(
        self, index: int, spec: JobSpec, request: Request, filenames: FilenameRegistry
    ) -> tuple[str, str]:
        """Return the names of the image and its preview ("" for none); no later job can use any file of this job."""
        output = spec.values.get("output") or self.template.format(index, request)
        filenames.reserve(output, spec.line)
        images.resolve_format(output, request.format)
        if request.save_phases:
            filenames.reserve_phases(output, spec.line)
        if self.reports:
            filenames.reserve(output + REPORT_SUFFIX, spec.line)
        preview = spec.values.get("preview", "")
        if preview:
            filenames.reserve(preview, spec.line)
            images.resolve_format(preview)
        return output, preview
