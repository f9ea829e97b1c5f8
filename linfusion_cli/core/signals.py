"""How a run is asked to end: at once, or where a stretch of work is worth it, at that stretch's end.

Signals and the time limit belong to the process, and so does what is kept here. Only the main thread asks and works.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from linfusion_cli.core.errors import Stopped, TimeLimitReached

# SIGUSR1 and SIGUSR2 as batch systems send them before the time is over: `sbatch --signal=USR1@120`.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE_SEC = 2.0  # how long a stretch may go on once a stop was asked for
ECHO_SEC = 0.5  # `timeout` signals its child and then the group, which is one wish and not two


class _StopRequest:
    """Whether somebody has asked, what for, and how many stretches within each other may be finished first."""

    stop: Stopped | None = None
    asked_at = 0.0
    stretches = 0


def install_handlers() -> None:
    """From now on SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 stop the run.

    What is ignored stays ignored: SIGHUP under nohup, SIGINT in a job that a script has started with &.
    """
    signal.signal(signal.SIGALRM, _on_alarm)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def ignore_further_signals() -> None:
    """The work is done, whatever is asked from now on: an exit code that is settled must not be lost."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_after(seconds: float) -> None:
    """Stop the run when so much time is over, as a signal would."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


@contextmanager
def critical_section() -> Iterator[None]:
    """A stretch of work that a stop lets come to its end, if that takes no longer than GRACE_SEC; then it is raised."""
    _StopRequest.stretches += 1
    try:
        yield
    finally:
        _StopRequest.stretches -= 1
    if _StopRequest.stop is not None and not _StopRequest.stretches:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise _StopRequest.stop


@contextmanager
def reraise_stop() -> Iterator[None]:
    """Where the run was asked to end, whatever fails within fails by that.

    Compiled code that calls back into Python makes an error of its own of the Stopped that was raised there.
    """
    try:
        yield
    except Exception as error:
        if _StopRequest.stop is None:
            raise
        raise _StopRequest.stop from error


def request_stop(stop: Stopped) -> None:
    """Raise `stop`, now or at the end of the stretch; a second wish is not asked to wait."""
    if _StopRequest.stop is None:
        _StopRequest.stop, _StopRequest.asked_at = stop, time.monotonic()
        if not _StopRequest.stretches:
            raise stop
        signal.setitimer(signal.ITIMER_REAL, GRACE_SEC)
    elif time.monotonic() - _StopRequest.asked_at > ECHO_SEC:
        for number in SIGNALS:  # what is left to do is to clear up, which takes a moment
            signal.signal(number, signal.SIG_IGN)
        raise _StopRequest.stop


def _on_signal(number: int, frame: FrameType | None) -> None:
    request_stop(Stopped(number))


def _on_alarm(number: int, frame: FrameType | None) -> None:
    """The time limit, or the end of the grace."""
    if _StopRequest.stop is None:
        request_stop(TimeLimitReached())
    elif _StopRequest.stretches:
        raise _StopRequest.stop
