"""Explain a time limit that is too short: repeating the command would stop at the same place forever."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from linfusion_cli.core.errors import TimeLimitReached
from linfusion_cli.core.units import format_seconds
from linfusion_cli.run.progress.recorder import RunningStage, RunRecorder

RESERVE = 1.25  # factor between what the run needs and the suggested limit
UNITS = {"start": "encoding the image of the phase", "denoise": "a step", "decode": "decoding the image"}


@contextmanager
def explain_time_limit(recorder: RunRecorder) -> Iterator[None]:
    """Add what the run needs to the TimeLimitReached that leaves this block, if the run has made no progress."""
    try:
        yield
    except TimeLimitReached as stop:
        if not stop.has_progress:
            stop.shortfall = describe_shortfall(stop.limit_sec, recorder.running)
        raise


def describe_shortfall(limit_sec: float, stage: RunningStage | None) -> str:
    """Return the message about a limit that ended before the first step, or before all steps are decoded."""
    reason = f"--time-limit {format_limit(limit_sec)} is too short: the run made no progress that can be resumed."
    if stage is None or stage.kind not in UNITS or stage.planned is None or math.isnan(stage.planned.seconds):
        return f"{reason} It was still preparing and loading. Use at least {format_limit(2 * limit_sec)}."
    planned = stage.planned.seconds / stage.total if stage.kind == "denoise" else stage.planned.seconds
    unit_sec = max(planned, stage.timer.seconds)
    before_sec = max(0.0, limit_sec - stage.timer.seconds)
    needs = f"Loading takes {format_seconds(before_sec)}, and {UNITS[stage.kind]} about {format_seconds(unit_sec)}."
    return f"{reason} {needs} Use at least {format_limit(RESERVE * (before_sec + unit_sec))}."


def format_limit(seconds: float) -> str:
    """Return a duration as --time-limit takes it, rounded up: 90s, 12m."""
    return f"{math.ceil(seconds)}s" if seconds < 120 else f"{math.ceil(seconds / 60)}m"
