"""Stop a run on a signal or at its time limit: immediately, or at the end of a short critical section.

Signals and timers belong to the process, so this state does, too. Only the main thread handles signals and works.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from linfusion_cli.core.errors import Stopped, TimeLimitReached

# Batch systems send SIGUSR1 or SIGUSR2 before the time limit of a job, e.g. `sbatch --signal=USR1@120`.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE_SEC = 2.0  # how long a critical section may continue after a stop request
REPEAT_SEC = 0.5  # `timeout` signals its child and then the process group: both signals are one request


class _StopRequest:
    """The pending stop request, its time, and the nesting depth of the critical sections that delay it."""

    pending: Stopped | None = None
    requested_at = 0.0
    critical_depth = 0
    limit_sec = 0.0


def install_handlers() -> None:
    """Let SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 stop the run.

    Ignored signals stay ignored: SIGHUP under nohup, SIGINT in a background job of a script.
    SIGTTOU is ignored: a run in the background of a terminal with `stty tostop` writes its lines and continues.
    """
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def ignore_further_signals() -> None:
    """Ignore all stop requests from now on: the work is done, and its exit code must not change."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def start_time_limit(seconds: float) -> None:
    """Stop the run after this time, as a signal would."""
    _StopRequest.limit_sec = seconds
    signal.setitimer(signal.ITIMER_REAL, seconds)


@contextmanager
def critical_section() -> Iterator[None]:
    """Delay a stop request until the end of this block, for GRACE_SEC at most."""
    _StopRequest.critical_depth += 1
    try:
        yield
    finally:
        _StopRequest.critical_depth -= 1
    if _StopRequest.pending is not None and not _StopRequest.critical_depth:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise _StopRequest.pending


@contextmanager
def reraise_stop() -> Iterator[None]:
    """Raise the pending Stopped in place of any exception from this block.

    Compiled code that calls back into Python replaces the Stopped raised there by an exception of another type.
    """
    try:
        yield
    except Exception as error:
        if _StopRequest.pending is None:
            raise
        raise _StopRequest.pending from error


def request_stop(stop: Stopped) -> None:
    """Raise `stop`, now or at the end of the critical section; raise it now if it is the second request."""
    if _StopRequest.pending is None:
        _StopRequest.pending, _StopRequest.requested_at = stop, time.monotonic()
        if not _StopRequest.critical_depth:
            raise stop
        signal.setitimer(signal.ITIMER_REAL, GRACE_SEC)
    elif time.monotonic() - _StopRequest.requested_at > REPEAT_SEC:
        for number in STOP_SIGNALS:  # only a short cleanup is left
            signal.signal(number, signal.SIG_IGN)
        raise _StopRequest.pending


def _on_signal(number: int, frame: FrameType | None) -> None:
    request_stop(Stopped(number))


def _on_alarm(number: int, frame: FrameType | None) -> None:
    """Handle the timer, which is the time limit or the end of the grace period."""
    if _StopRequest.pending is None:
        request_stop(TimeLimitReached(_StopRequest.limit_sec))
    elif _StopRequest.critical_depth:
        raise _StopRequest.pending
