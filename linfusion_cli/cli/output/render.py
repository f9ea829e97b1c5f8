"""What a person sees of a run: progress, notices and the report, all on stderr."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from linfusion_cli.cli.output import log_file as output_log_file
from linfusion_cli.core.errors import WriteFailed
from linfusion_cli.core.events import (
    Event,
    JobStarted,
    Notice,
    Observer,
    Planned,
    StageAdvanced,
    StageFinished,
    StageStarted,
)
from linfusion_cli.core.report import RunReport, StageReport
from linfusion_cli.core.units import format_bytes, format_seconds

QUIET_SEC = 600.0  # a log without a line for longer than this looks like a run that hangs
SHOWN_SEC = 0.05  # a stage other than a phase that took less is not worth a line
PLAIN_COLUMNS = 120


def on_terminal() -> bool:
    """Whether somebody watches stderr, which a service may also have closed."""
    return sys.stderr is not None and sys.stderr.isatty()


def say(text: str) -> None:
    """One line on stderr, as it is: no markup, no wrapping. A reader that has gone does not end hours of work."""
    try:
        typer.echo(text, err=True)
    except OSError:
        with suppress(OSError):
            discard_rest(sys.stderr)


def tell(text: str) -> None:
    """One line for a person on stderr, whatever `text` holds; with the time where nobody watches."""
    say(
        output_log_file.printable(text)
        if on_terminal()
        else f"{output_log_file.timestamp()} {output_log_file.printable(text)}"
    )


def announce(text: str) -> None:
    """One line on stderr, and in the log."""
    tell(text)
    output_log_file.write(text)


def discard_rest(stream: TextIO) -> None:
    """Send what `stream` still holds, and all that follows, nowhere: or its flush at exit fails, with exit code 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Answers:
    """Standard output, while what libraries print there goes to stderr."""

    stream: TextIO | None = None


def answer(text: str) -> None:
    """The result, on stdout. A reader that left early, as `head` does, is no error; a full disk is."""
    stream = _Answers.stream or sys.stdout
    try:
        typer.echo(text, file=stream)
    except OSError as error:
        discard_rest(stream)
        if not isinstance(error, BrokenPipeError):
            raise WriteFailed(f"Standard output refused this ({error.strerror}): {text}") from error


@contextmanager
def answers_alone() -> Iterator[None]:
    """On stdout answers and nothing else: what a library prints there, also from C, goes to stderr."""
    stdout, stderr = _descriptor(sys.stdout), _descriptor(sys.stderr)
    if stdout is None or _Answers.stream is not None:
        yield
        return
    how = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
    sys.stdout.flush()
    with os.fdopen(os.dup(stdout), "w", **how) as stream:
        _turn(stdout, os.open(os.devnull, os.O_WRONLY) if stderr is None else os.dup(stderr))
        _Answers.stream = stream
        try:
            yield
        finally:
            _Answers.stream = None
            with suppress(OSError):
                sys.stdout.flush()
            _turn(stdout, os.dup(stream.fileno()))


def _turn(descriptor: int, target: int) -> None:
    """Make `descriptor` lead where `target` does, which is closed."""
    os.dup2(target, descriptor)
    os.close(target)


def _descriptor(stream: TextIO | None) -> int | None:
    """That of a stream, which may have been closed, or replaced by something in memory."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None


@contextmanager
def watching(quiet: bool, log_file: Path | None = None) -> Iterator[Observer]:
    """An observer that shows a run on stderr: bars on a terminal, plain lines elsewhere, only notices if `quiet`.

    All lines also go to `log_file`, which stays open for how the run ends. Raises CannotCreate if it cannot be opened.
    """
    output_log_file.begin(log_file, tell)
    with answers_alone(), ExitStack() as stack:
        logged = [] if log_file is None else [stack.enter_context(Lines(output_log_file.write))]
        shown = notices_only if quiet else stack.enter_context(Bars() if on_terminal() else Lines(tell))
        yield told([shown, *logged])


def told(observers: Sequence[Observer]) -> Observer:
    """All of these as one."""

    def observer(event: Event) -> None:
        for each in observers:
            each(event)

    return observer


def notices_only(event: Event) -> None:
    if isinstance(event, Notice):
        tell(f"linfusion: {event.text}")


def title(stage: StageStarted) -> str:
    return f"{stage.name} {stage.size}" if stage.size else stage.name


def job_title(job: JobStarted) -> str:
    return f"job {job.number} of {job.count}: {job.name}"


def forecast(planned: Planned) -> str:
    """What a run is expected to take, in one line."""
    card = "" if planned.device_bytes is None else f" and {format_bytes(planned.device_bytes)} of the GPU's"
    memory = f"{format_bytes(planned.host_bytes)} of memory{card}"
    return f"expected: about {format_seconds(planned.seconds)}, {memory}"


class Bars:
    """A bar for each stage, with the time that is left of it."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:24}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]:7}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # a pipe gets its lines
        )
        self._task: TaskID | None = None
        self._total = 0

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Notice(text):
                self._progress.console.print(
                    f"linfusion: {output_log_file.printable(text)}", markup=False, soft_wrap=True
                )
            case JobStarted():
                for task in self._progress.task_ids:  # of the job before, which would all be drawn on and on
                    self._progress.remove_task(task)
                self._progress.console.print(job_title(event), markup=False, soft_wrap=True)
            case Planned():
                self._progress.console.print(forecast(event), markup=False, soft_wrap=True)
            case StageStarted(total=total, unit=unit):
                self._total = total
                self._task = self._progress.add_task(title(event), total=total, unit=unit)
            case StageAdvanced(done):
                self._progress.update(self._task, completed=done)
            case StageFinished(cut_short=cut_short):
                if not cut_short:
                    self._progress.update(self._task, completed=self._total)
                self._progress.stop_task(self._task)


class Lines:
    """A line when a phase is over, and one every ten minutes while it lasts, for logs, mails and pipes.

    What comes before the first phase (imports, hashes, prompts, models) is one line together.
    """

    def __init__(self, write: Callable[[str], None]):
        self._write = write
        self._lock = threading.Lock()
        self._stage: StageStarted | None = None
        self._began = self._spoke = time.monotonic()
        self._done = 0
        self._preparing_sec = 0.0
        self._over = threading.Event()

    def __enter__(self) -> Lines:
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def __call__(self, event: Event) -> None:
        with self._lock:
            match event:
                case Notice(text):
                    self._say(f"linfusion: {text}")
                case JobStarted():
                    self._say(job_title(event))
                case Planned():
                    self._say(forecast(event))
                case StageStarted(size=size):
                    if size is not None:
                        self._say_ready()
                    self._stage, self._done, self._began = event, 0, time.monotonic()
                case StageAdvanced(done):
                    self._done = done
                case StageFinished(seconds, cut_short) if self._stage is not None:
                    if not cut_short:
                        self._finish(self._stage, seconds)
                    self._stage = None

    def _finish(self, stage: StageStarted, seconds: float) -> None:
        if stage.size is None:
            self._preparing_sec += seconds
        elif stage.unit == "steps" or seconds >= SHOWN_SEC:
            self._say(f"{title(stage)}: {format_seconds(seconds)}")

    def _say_ready(self) -> None:
        if self._preparing_sec >= SHOWN_SEC:
            self._say(f"ready: {format_seconds(self._preparing_sec)}")
        self._preparing_sec = 0.0

    def _tick(self) -> None:
        while not self._over.wait(timeout=1):
            with self._lock:
                silent_sec = time.monotonic() - max(self._spoke, self._began)
                if self._stage is not None and silent_sec >= QUIET_SEC - 1:
                    self._say(self._so_far(self._stage))

    def _so_far(self, stage: StageStarted) -> str:
        elapsed = time.monotonic() - self._began
        text = f"{title(stage)}: {self._done}/{stage.total} {stage.unit}, {format_seconds(elapsed)}"
        if not self._done:
            return text
        return f"{text}, about {format_seconds(elapsed / self._done * (stage.total - self._done))} left"

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        self._write(text)


def plain(table: Table, columns: int = PLAIN_COLUMNS) -> str:
    """A table as lines of so many columns at most, whatever width a stream has."""
    text = io.StringIO()
    Console(file=text, width=columns, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def show_report(report: RunReport, quiet: bool) -> None:
    """The end of a run: a table on a terminal, one line elsewhere and in the log."""
    output_log_file.write(completed(report))
    if not quiet and on_terminal():
        say(plain(report_table(report)))
    elif not quiet:
        tell(completed(report))


def completed(report: RunReport) -> str:
    """What was made, how long it took and how much memory, in one line."""
    peaks = [_bytes(report.peak_host_bytes), _bytes(report.peak_device_bytes)]
    memory = "".join(f", {peak} of {what}" for peak, what in zip(peaks, ("memory", "the GPU's"), strict=True) if peak)
    took = f"{_bytes(report.file_bytes)} in {format_seconds(report.total_seconds)}".strip()
    return f"complete: {report.output}, {took}{memory}"


def report_table(report: RunReport) -> Table:
    """One row per stage, and one for the file."""
    heads = ("stage", "size", "steps", "time", "planned", "steps/s", "GPU peak", "planned", "host peak", "planned")
    table = Table(*heads, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for stage in report.stages:
        table.add_row(*_cells(stage))
    device, host = _peaks(report)
    table.add_row("total", str(report.size), "", format_seconds(report.total_seconds), "", "", device, "", host)
    table.add_row("file", report.format, "", format_bytes(report.file_bytes or 0))
    return table


def _cells(stage: StageReport) -> list[str]:
    rate, planned = stage.steps_per_second, stage.planned_seconds
    device, host = _peaks(stage)
    return [
        stage.name,
        str(stage.size or ""),
        str(stage.steps or ""),
        format_seconds(stage.seconds),
        "" if planned is None else format_seconds(planned),
        f"{rate:.2f}" if rate else "",
        device,
        _bytes(stage.planned_device_bytes),
        host,
        _bytes(stage.planned_host_bytes),
    ]


def _peaks(measured: StageReport | RunReport) -> list[str]:
    return [_bytes(measured.peak_device_bytes), _bytes(measured.peak_host_bytes)]


def _bytes(count: int | None) -> str:
    return "" if count is None else format_bytes(count)
