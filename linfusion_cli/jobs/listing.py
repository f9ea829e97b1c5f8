"""From a list to jobs in the order in which they run: those that share a model together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from linfusion_cli import images
from linfusion_cli.errors import LinfusionError
from linfusion_cli.jobs.fields import shortened
from linfusion_cli.jobs.joblist import MOST_SAID, Entry
from linfusion_cli.jobs.naming import Names, Template
from linfusion_cli.jobs.spread import Shard
from linfusion_cli.request import PictureRequest

Build = Callable[[Mapping[str, Any]], tuple[dict[str, str], PictureRequest]]

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
    """A picture to be made: its place in the list and line, what it says, and its file; or the `problem` why not.

    `build` makes the request when it is needed: of a hundred thousand jobs only what they say is kept.
    """

    index: int
    line: int
    values: Mapping[str, Any]
    build: Build
    output: Path | None = None
    preview: Path | None = None
    group: int = -1
    problem: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)  # of the request, in the record

    def request(self) -> tuple[dict[str, str], PictureRequest]:
        """What is asked for; before it, where each setting came from."""
        origins, request = self.build(self.values)
        return origins, replace(request, output=self.output, preview=self.preview)


@dataclass(frozen=True)
class Listing:
    """How a list becomes jobs: whose names they get, the seeds that multiply them, and this machine's part of them."""

    build: Build
    folder: Path
    template: Template
    seeds: tuple[int, ...] = ()
    shard: Shard = Shard()
    reports: bool = False

    def jobs(self, entries: Iterable[Entry]) -> list[Job]:
        """This machine's jobs: first those that cannot run, then by model, in the order of the list."""
        names, groups = Names(self.folder), {}
        listed = (self._job(*numbered, names, groups) for numbered in self._multiplied(entries))
        mine = [job for place, job in enumerate(listed) if self.shard.has(place)]
        return sorted(mine, key=lambda job: job.group)

    def _multiplied(self, entries: Iterable[Entry]) -> Iterator[tuple[int, Entry]]:
        """Place in the list, from 1, and entry, once for each seed, unless it has one of its own."""
        for index, entry in enumerate(entries, 1):
            if entry.problem or not self.seeds or "seed" in entry.values:
                yield index, entry
            else:
                for seed in self.seeds:
                    yield index, replace(entry, values=entry.values | {"seed": seed})

    def _job(self, index: int, entry: Entry, names: Names, groups: dict[tuple, int]) -> Job:
        if entry.problem:
            return Job(index, entry.line, {}, self.build, problem=entry.problem)
        values = {name: value for name, value in entry.values.items() if name not in ("output", "preview")}
        told = {"prompt": shortened(values.get("prompt", ""), PROMPT_LETTERS), "seed": values.get("seed")}
        try:
            _, request = self.build(values)
            told |= {"seed": request.seed, "prompt": shortened(request.prompt, PROMPT_LETTERS)}
            output, preview = self._files(index, entry, request, names)
        except LinfusionError as error:
            problem = shortened(str(error), MOST_SAID)
            return Job(index, entry.line, {}, self.build, problem=problem, told=told)
        models = tuple(getattr(request, name) for name in MODEL_SETTINGS)
        group = groups.setdefault(models, len(groups))
        return Job(index, entry.line, values, self.build, output, preview, group, told=told)

    def _files(self, index: int, entry: Entry, request: PictureRequest, names: Names) -> tuple[Path, Path | None]:
        """The picture's file and that of its preview, if it wants one; both are refused to all jobs that follow."""
        name = entry.values.get("output") or self.template.name(index, request)
        output = names.take(name, entry.line)
        images.format_for(output, request.format)
        if self.reports:
            names.take(name + REPORT_SUFFIX, entry.line)
        if "preview" not in entry.values:
            return output, None
        preview = names.take(entry.values["preview"], entry.line)
        images.format_for(preview)
        return output, preview
