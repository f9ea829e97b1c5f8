"""`linfusion batch`: generate or upscale many images from a list of jobs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linfusion_cli import settings
from linfusion_cli.batch.filenames import DEFAULT_TEMPLATE, FilenameTemplate
from linfusion_cli.batch.seeds import parse_seeds
from linfusion_cli.batch.shard import Shard as ListShard
from linfusion_cli.cli.output.batch_reporter import BatchReporter
from linfusion_cli.cli.output.crash_report import report_crash
from linfusion_cli.cli.output.progress import observe_run
from linfusion_cli.cli.output.streams import log as log_message
from linfusion_cli.cli.parsing.build_request import (
    Sources,
    build_job_request,
    configure_hub,
    read_command_options,
    start_time_limit,
)
from linfusion_cli.cli.parsing.options import add_settings
from linfusion_cli.core.errors import LinfusionError, TimeLimitReached, UsageError, WriteFailed
from linfusion_cli.core.events import Notice, Observer

if TYPE_CHECKING:
    from linfusion_cli.batch.queue import JobQueue
    from linfusion_cli.batch.results import Summary
    from linfusion_cli.batch.runner import BatchRunner

EXAMPLES = """
linfusion batch jobs.jsonl --output-dir out
linfusion batch prompts.txt --output-dir out --size 4096 --seeds 1-4 --dry-run
linfusion batch --watch inbox --output-dir out --log-file batch.log
"""
PANEL = "Jobs"

Jobs = Annotated[
    str | None,
    typer.Argument(
        help="The list of jobs: a .jsonl, .ndjson or .csv file, a .toml file with [[job]] tables, or a .txt file with "
        "one prompt per line. The format of standard input (-), pipes and files without a suffix is detected from "
        "their first lines."
    ),
]


def job_option(help: str, *flags: str, **facts: Any) -> Any:
    """Return an option about the list of jobs."""
    return typer.Option(*flags, help=help, rich_help_panel=PANEL, show_default=False, **facts)


OutputDir = Annotated[Path, job_option("Folder of the images; created if it is missing.", metavar="FOLDER")]
Name = Annotated[
    str,
    job_option(
        "File names; the fields are index, slug (of the prompt), seed, size, width and height. "
        f"[default: {DEFAULT_TEMPLATE}]",
        metavar="TEMPLATE",
    ),
]
Seeds = Annotated[
    str | None, job_option("Run each job that has no seed once per seed: 1-20, or 1,5,9-12.", metavar="SEEDS")
]
Shard = Annotated[str | None, job_option("Run only the I-th of N parts, for several machines.", metavar="I/N")]
StopOnError = Annotated[bool, job_option("Stop after the first job that fails.", "--stop-on-error")]
Watch = Annotated[
    Path | None,
    job_option(
        "Instead of a single list, run every list that appears in this folder, until a signal stops the program. "
        "Files with other suffixes are ignored.",
        metavar="FOLDER",
    ),
]
DryRun = Annotated[bool, job_option("Only list the jobs and their files, and which are complete.", "--dry-run")]
Reports = Annotated[bool, job_option("Write the report of each image next to it, as FILE.json.", "--reports")]


@dataclass(frozen=True)
class ListOptions:
    """The options that define how a list of jobs is expanded and where its files are written."""

    folder: Path
    name: str
    seeds: str | None
    shard: str | None
    reports: bool


@add_settings("batch")
def command(
    given: dict[str, Any],
    output_dir: OutputDir,
    jobs: Jobs = None,
    name: Name = DEFAULT_TEMPLATE,
    seeds: Seeds = None,
    shard: Shard = None,
    stop_on_error: StopOnError = False,
    watch: Watch = None,
    dry_run: DryRun = False,
    reports: Reports = False,
) -> None:
    """Generate many images from a list of jobs. A job can define any setting; options apply to jobs without it.

    Lists are files with the suffix .jsonl, .ndjson, .csv, .toml or .txt, pipes, or standard input.

    The same command again skips complete images and resumes the others. Exit codes: 0 if all are complete, 3 if some
    failed.
    """
    command_options = read_command_options(given)
    check_conflicts(jobs, watch, dry_run, seeds, given)
    configure_hub(bool(given["download"]), command_options.quiet)
    start_time_limit(command_options.time_limit)
    with ExitStack() as at_exit, observe_run(command_options.quiet, command_options.log_file) as observer:
        queue = build_queue(given, ListOptions(output_dir, name, seeds, shard, reports), observer)
        source, quiet = jobs or str(watch), command_options.quiet
        reporter = BatchReporter(observer, command_options.json, reports, source, dry_run, quiet)
        batch = build_runner(queue, observer, reporter, stop_on_error, dry_run)
        at_exit.callback(reporter.show_summary, batch)  # after the progress bars are closed, also after a signal
        try:
            run_list(batch, queue, source) if watch is None else watch_folder(batch, queue, watch)
        except TimeLimitReached as stop:
            stop.shortfall = "" if batch.summary.done else stop.shortfall  # complete images are progress
            raise
    raise typer.Exit(batch.summary.exit_code)


def check_conflicts(
    source: str | None, watch: Path | None, dry_run: bool, seeds: str | None, given: Mapping[str, Any]
) -> None:
    """Raise UsageError for options that exclude each other."""
    if (source is None) == (watch is None):
        raise UsageError("Give either a list of jobs or --watch.", "The list is a file, or - for standard input.")
    if watch is not None and dry_run:
        raise UsageError("--watch and --dry-run exclude each other.", "Omit one of them.")
    if seeds is not None and given["seed"] is not None:
        raise UsageError("--seed and --seeds exclude each other.", "Omit one of them.")


def build_queue(given: dict[str, Any], list_options: ListOptions, observer: Observer) -> JobQueue:
    """Return the queue that expands lists to jobs; raises UsageError, InputNotFound or ConfigError."""
    from linfusion_cli.batch.queue import JobQueue  # numpy and more: slow to import, not needed for --help

    sources = Sources.read(given, os.environ, observer)
    check_values(sources)
    seeds, shard = list_options.seeds, list_options.shard
    return JobQueue(
        build_request=lambda values: build_job_request(sources, values),
        folder=list_options.folder,
        template=FilenameTemplate.parse(list_options.name),
        seeds=() if seeds is None else parse_seeds(seeds),
        shard=ListShard() if shard is None else ListShard.parse(shard),
        reports=list_options.reports,
    )


def check_values(sources: Sources) -> None:
    """Raise the errors of options, variables, config file and preset: they are not those of a job."""
    for layer in [*sources.layers, *sources.preset_layers.values()]:
        settings.raise_errors(layer)


def build_runner(
    queue: JobQueue, observer: Observer, reporter: BatchReporter, stop_on_error: bool, dry_run: bool
) -> BatchRunner:
    """Return the runner of the jobs, which records results unless it is a dry run; raises CannotCreateOutput."""
    from linfusion_cli.batch.results import ResultsLog
    from linfusion_cli.batch.runner import BatchRunner, dry_run_job, run_job

    results_log = None if dry_run else ResultsLog(queue.folder / queue.shard.results_name)
    execute = dry_run_job if dry_run else run_job
    return BatchRunner(execute, results_log, observer, reporter, report_crash, stop_on_error)


def run_list(batch: BatchRunner, queue: JobQueue, source: str) -> Summary:
    """Run the jobs of one list; raises InputNotFound, or DataError for an invalid list or one without jobs."""
    from linfusion_cli.batch.parsers.reader import STDIN, read_list
    from linfusion_cli.batch.prompt_options import PromptOptionCounter

    option_counter, name = PromptOptionCounter(), Path(source).name
    jobs = queue.build_jobs(option_counter.count(read_list(source)))
    if notice := option_counter.build_notice("standard input" if source == STDIN else name):
        batch.observer(Notice(notice))
    return batch.run(jobs, name)


def watch_folder(batch: BatchRunner, queue: JobQueue, folder: Path) -> None:
    """Run the jobs of every list that appears in the folder, until a signal; log the errors of invalid lists."""
    from linfusion_cli.batch.watch import watch

    def run_watched_list(path: Path) -> bool:
        try:
            return not run_list(batch, queue, str(path)).failed  # jobs that another run has locked are its own
        except WriteFailed:  # the results file cannot be written: not an error of this list
            raise
        except LinfusionError as error:
            log_message(f"linfusion: {error}")
            return False

    watch(folder, run_watched_list, observer=batch.observer)
