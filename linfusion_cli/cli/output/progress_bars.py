"""Show the progress of a run on a terminal: a bar for the running stage, in one line of any width."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.text import Text

from linfusion_cli.cli.output.event_lines import format_estimate, format_job, format_notice, format_started
from linfusion_cli.cli.output.log_file import escape_line
from linfusion_cli.cli.output.tables import GAP, cut_text
from linfusion_cli.core.events import (
    Event,
    JobStarted,
    Notice,
    Planned,
    StageAdvanced,
    StageFinished,
    StageStarted,
)

MIN_BAR_WIDTH, MAX_BAR_WIDTH = 10, 30
MIN_NAME_WIDTH, MAX_NAME_WIDTH = 11, 24


def is_in_background() -> bool:
    """Return whether another process group, such as the shell after Ctrl-Z and `bg`, owns the terminal of stderr."""
    with suppress(OSError, ValueError):
        return os.tcgetpgrp(sys.stderr.fileno()) != os.getpgrp()
    return False  # the terminal of another session, as with `script`, or none


class BarLine:
    """The line of a stage: its name, bar, progress, elapsed time and remaining time, as far as the width permits."""

    def __init__(self, task: Task):
        self._task = task

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - 1  # some terminals wrap a line that fills them
        name_width, bar_width, details = arrange_line(format_details(self._task), width)
        name = cut_text(self._task.description, name_width)
        yield Text(name + " " * (name_width - cell_len(name)), end="")
        if bar_width:
            yield Text(GAP, end="")
            yield ProgressBar(total=self._task.total, completed=self._task.completed, width=bar_width)
        yield Text("".join(GAP + detail for detail in details))


def format_details(task: Task) -> list[str]:
    """Return the progress, the elapsed and the remaining time of a stage, the most important last."""
    count = f"{task.completed:.0f}/{task.total:.0f} {task.fields['unit']}"
    elapsed = _format_clock(task.finished_time if task.finished else task.elapsed)
    if task.finished or task.stop_time is not None:
        return [f"{count:<12}", elapsed]
    return [f"{count:<12}", elapsed, f"left {_format_clock(task.time_remaining)}"]


def _format_clock(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=int(seconds)))


def arrange_line(details: list[str], width: int) -> tuple[int, int, list[str]]:
    """Return the widths of name and bar, 0 without a bar, and the details that fit into a line of `width` columns."""
    details = list(details)
    while details and width - _measure(details) < MIN_NAME_WIDTH:
        details.pop(-2 if len(details) > 2 else 0)
    room = width - _measure(details)
    bar_width = min(MAX_BAR_WIDTH, room - MAX_NAME_WIDTH - len(GAP))
    return (
        (MAX_NAME_WIDTH, bar_width, details) if bar_width >= MIN_BAR_WIDTH else (min(room, MAX_NAME_WIDTH), 0, details)
    )


def _measure(details: list[str]) -> int:
    return sum(len(GAP) + len(detail) for detail in details)


class ForegroundProgress(Progress):
    """Bars that are only drawn while this process is in the foreground of its terminal."""

    def __init__(self, console: Console, redirect_stdout: bool):
        self._console = console  # Progress draws once before it has a console
        super().__init__(console=console, redirect_stdout=redirect_stdout)

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the line of each stage. This is called before each drawing, also by the thread that draws regularly."""
        self.check_foreground()
        yield from map(BarLine, self.tasks)

    def check_foreground(self) -> None:
        """Let the console draw the bars after what it prints, or not."""
        self._console.is_interactive = self._console.is_terminal and not is_in_background()


class ProgressBars:
    """A bar for the running stage; the lines of finished stages stay above it."""

    def __init__(self) -> None:
        self._progress = ForegroundProgress(
            console=Console(stderr=True, highlight=False, markup=False, emoji=False),
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # a pipe must get the lines themselves
        )
        self._task: TaskID | None = None
        self._total = 0

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        self._progress.console.show_cursor(True)  # Ctrl-Z must not leave a shell without a cursor
        return self

    def __exit__(self, *_: object) -> None:
        self._finish_bar(cut_short=True)  # of a stage that was interrupted
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show an event of the run."""
        match event:
            case Notice(text):
                self._print(format_notice(escape_line(text)))
            case JobStarted():
                self._remove_bar()
                self._print(escape_line(format_job(event)))
            case Planned():
                self._print(format_estimate(event))
            case StageStarted(total=total, unit=unit):
                self._remove_bar()
                self._total = total
                self._task = self._progress.add_task(format_started(event), total=total, unit=unit)
            case StageAdvanced(done):
                if self._task is not None:
                    self._progress.update(self._task, completed=done)
            case StageFinished(cut_short=cut_short):
                self._finish_bar(cut_short)

    def _print(self, line: RenderableType) -> None:
        """Print a line above the bar."""
        self._progress.check_foreground()
        self._progress.console.print(line, soft_wrap=isinstance(line, str))

    def _remove_bar(self) -> None:
        """Remove the bar of a stage that has not ended."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None

    def _finish_bar(self, cut_short: bool) -> None:
        """Replace the bar by a line that is not drawn again: drawing several lines again damages a resized terminal."""
        if self._task is None:
            return
        if not cut_short:
            self._progress.update(self._task, completed=self._total)
        self._progress.stop_task(self._task)
        line = BarLine(next(task for task in self._progress.tasks if task.id == self._task))
        self._remove_bar()
        self._print(line)
