"""Show the progress of a run on stderr and in the log file: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from linfusion_cli.cli.output.log_file import escape_line, open_log, write_log
from linfusion_cli.cli.output.streams import echo_line, is_terminal, redirect_library_output
from linfusion_cli.core.events import (
    Event,
    JobStarted,
    Notice,
    Observer,
    Planned,
    StageAdvanced,
    StageFinished,
    StageStarted,
    format_stage,
)
from linfusion_cli.core.units import format_bytes, format_seconds

MAX_SILENCE_SEC = 600.0  # a log without new lines for longer than this looks like a run that hangs
MIN_LISTED_SEC = 0.05  # stages that take less time get no line, except phases


@contextmanager
def observe_run(quiet: bool, log_file: Path | None = None) -> Iterator[Observer]:
    """Yield an observer that shows a run on stderr: bars on a terminal, lines elsewhere, only notices if `quiet`.

    `log_file` gets all lines, also those of a quiet run. It stays open until `close_log`, which writes how the run
    ended. Raises CannotCreateOutput if it cannot be opened.
    """
    open_log(log_file, echo_line)
    with redirect_library_output(), ExitStack() as stack:
        logged = [] if log_file is None else [stack.enter_context(ProgressLines(write_log))]
        shown = echo_notice if quiet else stack.enter_context(_build_display())
        yield combine_observers([shown, *logged])


def _build_display() -> ProgressBars | ProgressLines:
    return ProgressBars() if is_terminal() else ProgressLines(echo_line)


def combine_observers(observers: Sequence[Observer]) -> Observer:
    """Return an observer that passes each event to all `observers`."""

    def observer(event: Event) -> None:
        for each in observers:
            each(event)

    return observer


def echo_notice(event: Event) -> None:
    """Write a notice to stderr; ignore all other events."""
    if isinstance(event, Notice):
        echo_line(format_notice(event.text))


def format_notice(text: str) -> str:
    """Return a notice with the name of the program."""
    return f"linfusion: {text}"


def format_started(stage: StageStarted) -> str:
    """Return kind, phase and size of a stage: "denoise 2x 2048x2048"."""
    name = format_stage(stage.kind, stage.phase_name)
    return f"{name} {stage.size}" if stage.size else name


def format_job(job: JobStarted) -> str:
    """Return number and file name of a job: "job 2 of 9: b.png"."""
    return f"job {job.number} of {job.count}: {job.name}"


def format_estimate(planned: Planned) -> str:
    """Return the estimated time and peak memory of a run as one line."""
    device = "" if planned.device_bytes is None else f", {format_bytes(planned.device_bytes)} of GPU memory"
    memory = f"{format_bytes(planned.host_bytes)} of host memory{device}"
    return f"estimate: {format_seconds(planned.seconds)}, {memory}"


class ProgressBars:
    """A progress bar for each stage, with the remaining time."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:24}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]:7}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # a pipe must get the lines themselves
        )
        self._task: TaskID | None = None
        self._total = 0

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show an event of the run."""
        match event:
            case Notice(text):
                self._print(format_notice(escape_line(text)))
            case JobStarted():
                self._remove_bars()
                self._print(format_job(event))
            case Planned():
                self._print(format_estimate(event))
            case StageStarted(total=total, unit=unit):
                self._total = total
                self._task = self._progress.add_task(format_started(event), total=total, unit=unit)
            case StageAdvanced(done):
                if self._task is not None:
                    self._progress.update(self._task, completed=done)
            case StageFinished(cut_short=cut_short):
                self._finish_bar(cut_short)

    def _print(self, line: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(line, markup=False, soft_wrap=True)

    def _remove_bars(self) -> None:
        """Remove the bars of the previous job, which would be redrawn otherwise."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._task = None

    def _finish_bar(self, cut_short: bool) -> None:
        if self._task is None:
            return
        if not cut_short:
            self._progress.update(self._task, completed=self._total)
        self._progress.stop_task(self._task)


class ProgressLines:
    """A line when a phase ends, and at least one every ten minutes during a phase: for logs, mails and pipes.

    All stages before the first phase (imports, hashes, prompts, models) share one line.
    """

    def __init__(self, write: Callable[[str], None]):
        self._write = write
        self._lock = threading.Lock()
        self._stage: StageStarted | None = None
        self._started_at = self._written_at = time.monotonic()
        self._done = 0
        self._preparation_sec = 0.0
        self._is_closed = threading.Event()

    def __enter__(self) -> ProgressLines:
        threading.Thread(target=self._report_periodically, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()

    def __call__(self, event: Event) -> None:
        """Write the line of an event, if it has one."""
        with self._lock:
            match event:
                case Notice(text):
                    self._write_line(format_notice(text))
                case JobStarted():
                    self._write_line(format_job(event))
                case Planned():
                    self._write_line(format_estimate(event))
                case StageStarted(size=size):
                    if size is not None:
                        self._write_preparation()
                    self._stage, self._done, self._started_at = event, 0, time.monotonic()
                case StageAdvanced(done):
                    self._done = done
                case StageFinished(seconds, cut_short) if self._stage is not None:
                    if not cut_short:
                        self._write_stage(self._stage, seconds)
                    self._stage = None

    def _write_stage(self, stage: StageStarted, seconds: float) -> None:
        if stage.size is None:
            self._preparation_sec += seconds
        elif stage.unit == "steps" or seconds >= MIN_LISTED_SEC:
            self._write_line(f"{format_started(stage)}: {format_seconds(seconds)}")

    def _write_preparation(self) -> None:
        if self._preparation_sec >= MIN_LISTED_SEC:
            self._write_line(f"ready: {format_seconds(self._preparation_sec)}")
        self._preparation_sec = 0.0

    def _report_periodically(self) -> None:
        """Write the state of the stage whenever MAX_SILENCE_SEC have passed without a line."""
        while not self._is_closed.wait(timeout=1):
            with self._lock:
                silent_sec = time.monotonic() - max(self._written_at, self._started_at)
                if self._stage is not None and silent_sec >= MAX_SILENCE_SEC - 1:
                    self._write_line(self._format_state(self._stage))

    def _format_state(self, stage: StageStarted) -> str:
        elapsed_sec = time.monotonic() - self._started_at
        text = f"{format_started(stage)}: {self._done}/{stage.total} {stage.unit}, {format_seconds(elapsed_sec)}"
        if not self._done:
            return text
        return f"{text}, about {format_seconds(elapsed_sec / self._done * (stage.total - self._done))} left"

    def _write_line(self, text: str) -> None:
        self._written_at = time.monotonic()
        self._write(text)
