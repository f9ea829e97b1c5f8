"""`linfusion batch`: a list of jobs and options -> pictures in a folder, and what came of each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linfusion_cli import settings
from linfusion_cli.batch.filenames import TEMPLATE, FilenameTemplate
from linfusion_cli.batch.shard import Shard as Part
from linfusion_cli.batch.shard import parse_seeds
from linfusion_cli.cli.commands.generate import report_file
from linfusion_cli.cli.output import log_file as output_log_file
from linfusion_cli.cli.output import render
from linfusion_cli.cli.output.crash_report import bug_sentence
from linfusion_cli.cli.parsing import options
from linfusion_cli.cli.parsing.build_request import Sources, keep_to, quieten_hub, read_options
from linfusion_cli.core.errors import LinfusionError, UsageError, WriteFailed
from linfusion_cli.core.events import Notice, Observer
from linfusion_cli.settings.request import GenerateRequest, ImageRequest, UpscaleRequest

if TYPE_CHECKING:
    from linfusion_cli.batch.queue import JobQueue
    from linfusion_cli.batch.results import JobResult, Summary
    from linfusion_cli.batch.runner import BatchRunner
    from linfusion_cli.core.report import RunReport

PER_IMAGE_FILES = ("output", "preview", "keep_latents")  # files: one name cannot be that of many
MAX_LISTED = 20

OutputDir = Annotated[Path, typer.Option(help="The folder of the pictures, made if it is missing.", show_default=False)]
Name = Annotated[
    str, typer.Option(help="How they are called, by index, slug (of the prompt), seed, size, width and height.")
]
Seeds = Annotated[str | None, typer.Option(help="Make each job that names no seed once for each: 1-20, or 1,5,9-12.")]
Shard = Annotated[str | None, typer.Option(metavar="I/N", help="Only the I-th of N parts, for several machines.")]
StopOnError = Annotated[bool, typer.Option("--stop-on-error", help="End with the first job that fails.")]
Watch = Annotated[
    Path | None,
    typer.Option(
        help="Instead of one list, every list that appears in this folder, until stopped by a signal. Files with other "
        "suffixes stay there."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list the jobs, their files, and what is there already.")]
Reports = Annotated[bool, typer.Option("--reports", help="Write each picture's report beside it, as FILE.json.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, instead of the files' paths.")]


@options.takes_a_request(options.of_batch, without=PER_IMAGE_FILES, own_first=True)
def command(
    given: dict[str, Any],
    output_dir: OutputDir,
    name: Name = TEMPLATE,
    seeds: Seeds = None,
    shard: Shard = None,
    stop_on_error: StopOnError = False,
    watch: Watch = None,
    dry_run: DryRun = False,
    reports: Reports = False,
    as_json: Json = False,
    quiet: options.Quiet = False,
    log_file: options.LogFile = None,
    time_limit: options.TimeLimit = None,
) -> None:
    """Make many pictures from a list of jobs, each with any setting of its own; options hold for those without.

    Lists are files that end in .jsonl, .ndjson, .csv, .toml or .txt, pipes, and standard input.

    The same command again skips what is complete and goes on with the rest. 0: all are; 3: some failed.
    """
    source = given.pop("jobs")
    check_together(source, watch, dry_run, seeds, given)
    quieten_hub(bool(given["download"]), quiet)
    keep_to(time_limit)
    with ExitStack() as at_the_end, render.watching(quiet, log_file) as observer:
        listing = read_listing(given, observer, output_dir, name, seeds, shard, reports)
        shown = Shown(observer, as_json, reports, source or str(watch), dry_run, quiet)
        batch = opened_batch(listing, observer, shown, stop_on_error, dry_run)
        at_the_end.callback(shown.summary, batch)  # when no bars are drawn any more, also after a signal
        if watch is None:
            carry_out(batch, listing, source)
        else:
            watch_folder(batch, listing, watch)
    raise typer.Exit(batch.tally.exit_code)


def check_together(
    source: str | None, watch: Path | None, dry_run: bool, seeds: str | None, given: Mapping[str, Any]
) -> None:
    """Raise UsageError for options that contradict each other."""
    if (source is None) == (watch is None):
        raise UsageError("Give either a list of jobs or --watch.", "Name the list, or - for standard input.")
    if watch is not None and dry_run:
        raise UsageError("--watch and --dry-run do not go together.", "Leave one of them out.")
    if seeds is not None and given["seed"] is not None:
        raise UsageError("--seed and --seeds do not go together.", "Leave one of them out.")


def read_listing(
    given: dict[str, Any],
    observer: Observer,
    folder: Path,
    name: str,
    seeds: str | None,
    shard: str | None,
    reports: bool,
) -> JobQueue:
    """How lists become jobs; raises UsageError, InputMissing or ConfigError for what holds for all of them."""
    from linfusion_cli.batch.queue import JobQueue  # numpy and more: not for --help to wait for

    given = read_options(given)
    preset = given.pop("preset")
    sources = Sources.read(given, preset, os.environ, observer)
    return JobQueue(
        build=lambda values: job_request(sources, values),
        folder=folder,
        template=FilenameTemplate.parse(name),
        seeds=() if seeds is None else parse_seeds(seeds),
        shard=Part() if shard is None else Part.parse(shard),
        reports=reports,
    )


def job_request(sources: Sources, values: Mapping[str, Any]) -> tuple[dict[str, str], ImageRequest]:
    """The request of a job that says this, all else from `sources`; before it, where each setting came from."""
    kind = GenerateRequest if "image" not in values else UpscaleRequest
    own = {name: value for name, value in values.items() if name != "preset"}
    merged = sources.merge(kind, settings.Layer(settings.JOB, own), values.get("preset"))
    if kind is GenerateRequest and "prompt" not in merged.values:
        raise UsageError("It has no prompt.", "Give it one, or an image to upscale.")
    return merged.origins(kind), settings.build_request(merged, kind)


def opened_batch(
    listing: JobQueue, observer: Observer, shown: Shown, stop_on_error: bool, dry_run: bool
) -> BatchRunner:
    """What carries jobs out, with its record, which a dry run has not; raises CannotCreate."""
    from linfusion_cli.batch.results import ResultsLog
    from linfusion_cli.batch.runner import BatchRunner, dry_run_job, run_job

    record = None if dry_run else ResultsLog(listing.folder / listing.shard.record)
    make = dry_run_job if dry_run else run_job
    return BatchRunner(make, record, observer, shown, bug_sentence, stop_on_error)


def carry_out(batch: BatchRunner, listing: JobQueue, source: str) -> Summary:
    """Run the jobs of one list; raises InputMissing, or DataError for a file that is not a list or has no jobs."""
    from linfusion_cli.batch.parsers.parsers import STDIN, read_list
    from linfusion_cli.batch.prompt_options import OptionsInList

    options_found, name = OptionsInList(), Path(source).name
    jobs = listing.jobs(options_found.count(read_list(source)))
    if notice := options_found.notice("standard input" if source == STDIN else name):
        batch.observer(Notice(notice))
    return batch.run(jobs, name)


def watch_folder(batch: BatchRunner, listing: JobQueue, folder: Path) -> None:
    """Run the jobs of every list that appears, for ever, and report unreadable lists and files that are not lists."""
    from linfusion_cli.batch.watch import watch

    def carried_out(path: Path) -> bool:
        try:
            return not carry_out(batch, listing, str(path)).failed  # what another run has begun, that will end
        except WriteFailed:  # of the record: no list is to blame
            raise
        except LinfusionError as error:
            render.announce(f"linfusion: {error}")
            return False

    watch(folder, carried_out, observer=batch.observer)


@dataclass
class Shown:
    """What is told of a batch: on stdout the files as they become complete, or JSON at the end."""

    observer: Observer
    as_json: bool
    reports: bool
    source: str
    is_dry: bool
    is_quiet: bool
    listed: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, outcome: JobResult, report: RunReport | None) -> None:
        """An outcome."""
        if outcome.status in ("done", "skipped") and self.reports and not self.is_dry:
            self._write_report(Path(outcome.output), report)
        if outcome.status in ("failed", "held"):
            self.observer(Notice(f"line {outcome.line} {outcome.status}: {outcome.error}"))
        elif self.is_dry and self.as_json:
            self.listed.append({"line": outcome.line, "status": outcome.status, "output": outcome.output})
        elif not self.as_json:
            render.answer(f"{outcome.status}\t{outcome.output}" if self.is_dry else outcome.output)

    def _write_report(self, output: Path, report: RunReport) -> None:
        """One that cannot be written does not take its picture with it."""
        try:
            write_report(output, report)
        except LinfusionError as error:
            self.observer(Notice(str(error)))

    def summary(self, batch: BatchRunner) -> None:
        """What came of all jobs."""
        tally = asdict(batch.tally)
        record = None if batch.record is None else str(batch.record.path)
        counts = ", ".join(f"{count} {status}" for status, count in tally.items() if count) or "no job is finished"
        told = f"batch: {counts}" if record is None else f"batch: {counts}; all are told of in {record}"
        tell = render.announce if not self.is_quiet or batch.tally.exit_code else output_log_file.write
        for line in (told, *failures_shown(batch.failures)):
            tell(line)
        if self.as_json:
            failures = [asdict(outcome) for outcome in batch.failures]
            result = {"jobs": self.source, **tally, "results": record, "failures": failures}
            result |= {"outputs": self.listed} if self.is_dry else {}
            render.answer(json.dumps(result, indent=2))


def failures_shown(failures: list[JobResult]) -> list[str]:
    """The first of them, a line each."""
    lines = [f"  {failure.list}:{failure.line}: {failure.error}" for failure in failures[:MAX_LISTED]]
    more = len(failures) - MAX_LISTED
    return [*lines, f"  and {more} more"] if more > 0 else lines


def write_report(output: Path, report: RunReport) -> None:
    """The report beside the picture, in place of an older one; of a picture that was there, only where none is.

    Raises CannotCreate where another file is in its place.
    """
    from linfusion_cli.batch.queue import REPORT_SUFFIX

    path = output.with_name(output.name + REPORT_SUFFIX)
    ours = is_report(path)
    if report.already_complete and ours:
        return
    with report_file(path, overwrite=ours) as save:
        save(report)


def is_report(path: Path) -> bool:
    """Whether there is a report of a run at `path`."""
    try:
        return {"schema", "request", "stages"} <= json.loads(path.read_bytes()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
