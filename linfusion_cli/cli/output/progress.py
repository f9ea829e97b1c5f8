"""Show the progress of a run on stderr and in the log file: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from linfusion_cli.cli.output.event_lines import format_estimate, format_job, format_notice, format_started
from linfusion_cli.cli.output.log_file import open_log, write_log
from linfusion_cli.cli.output.streams import can_move_cursor, echo_line, redirect_library_output
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
from linfusion_cli.core.units import format_seconds

if TYPE_CHECKING:
    from linfusion_cli.cli.output.progress_bars import ProgressBars

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
    if not can_move_cursor():
        return ProgressLines(echo_line)
    from linfusion_cli.cli.output.progress_bars import ProgressBars  # rich: slow to import, not needed for --help

    return ProgressBars()


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
