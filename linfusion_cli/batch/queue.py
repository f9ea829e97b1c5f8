"""From a list to jobs in the order in which they run: those that share a model together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linfusion_cli import images
from linfusion_cli.batch.filenames import FilenameRegistry, FilenameTemplate
from linfusion_cli.batch.parsers.parsers import MAX_PROBLEM_CHARS, JobSpec
from linfusion_cli.batch.shard import Shard
from linfusion_cli.core.errors import LinfusionError
from linfusion_cli.core.text import shorten
from linfusion_cli.settings.request import ImageRequest

Build = Callable[[Mapping[str, Any]], tuple[dict[str, str], ImageRequest]]

MODEL_SETTINGS = (
    "model",
    "linfusion",
    "linfusion_merge",
    "linfusion_base",
    "vae",
    "lora",
    "textual_inversion",
    "ip_adapter",
    "ip_scale",
    "ip_image_encoder",
    "controlnet",
    "dtype",
    "device",
)
REPORT_SUFFIX = ".json"  # after the picture's name, suffix and all: no two pictures have one report
PROMPT_LETTERS = 120  # of a prompt that are told


@dataclass(frozen=True, slots=True)
class Job:
    """A picture to be made: place in the list and line, what it says, its file's name; or the `problem` why not.

    The request is made when it is needed: of a hundred thousand jobs only what they say is kept.
    """

    index: int
    line: int
    values: Mapping[str, Any]
    listing: JobQueue
    name: str = ""
    preview: str = ""
    seed: int | None = None
    group: int = -1
    problem: str = ""

    def request(self) -> tuple[dict[str, str], ImageRequest]:
        """What is asked for; before it, where each setting came from."""
        origins, request = self.listing.build(self.values)
        return origins, replace(request, output=self.output, preview=self._path(self.preview))

    @property
    def output(self) -> Path | None:
        """Its file."""
        return self._path(self.name)

    @property
    def prompt(self) -> str:
        """As far as it is told of."""
        return shorten(self.values.get("prompt", ""), PROMPT_LETTERS)

    def _path(self, name: str) -> Path | None:
        return self.listing.folder / name if name else None


@dataclass(frozen=True)
class JobQueue:
    """How a list becomes jobs: whose names they get, the seeds that multiply them, and this machine's part of them."""

    build: Build
    folder: Path
    template: FilenameTemplate
    seeds: tuple[int, ...] = ()
    shard: Shard = Shard()
    reports: bool = False

    def jobs(self, entries: Iterable[JobSpec]) -> list[Job]:
        """This machine's jobs: first those that cannot run, then by model, in the order of the list."""
        names, groups = FilenameRegistry(self.folder), {}
        listed = (self._job(*numbered, names, groups) for numbered in self._multiplied(entries))
        mine = [job for place, job in enumerate(listed) if self.shard.has(place)]
        return sorted(mine, key=lambda job: job.group)

    def _multiplied(self, entries: Iterable[JobSpec]) -> Iterator[tuple[int, JobSpec]]:
        """Place in the list, from 1, and entry, once for each seed, unless it has one of its own."""
        for index, entry in enumerate(entries, 1):
            if entry.problem or not self.seeds or "seed" in entry.values:
                yield index, entry
            else:
                for seed in self.seeds:
                    yield index, replace(entry, values=entry.values | {"seed": seed})

    def _job(self, index: int, entry: JobSpec, names: FilenameRegistry, groups: dict[tuple, int]) -> Job:
        values = {name: value for name, value in entry.values.items() if name not in ("output", "preview")}
        job = Job(index, entry.line, values, self, problem=entry.problem)
        if entry.problem:
            return job
        try:
            _, request = self.build(values)
            job = replace(job, seed=request.seed)
            output, preview = self._files(index, entry, request, names)
        except LinfusionError as error:
            return replace(job, problem=shorten(str(error), MAX_PROBLEM_CHARS))
        models = tuple(getattr(request, name) for name in MODEL_SETTINGS)
        return replace(job, name=output, preview=preview, group=groups.setdefault(models, len(groups)))

    def _files(self, index: int, entry: JobSpec, request: ImageRequest, names: FilenameRegistry) -> tuple[str, str]:
        """The picture's file and that of its preview, if it wants one; both are refused to all jobs that follow."""
        output = entry.values.get("output") or self.template.name(index, request)
        names.take(output, entry.line)
        images.format_for(output, request.format)
        if request.save_phases:
            names.take_phases(output, entry.line)
        if self.reports:
            names.take(output + REPORT_SUFFIX, entry.line)
        preview = entry.values.get("preview", "")
        if preview:
            names.take(preview, entry.line)
            images.format_for(preview)
        return output, preview
