"""Format the events of a run as lines of text."""

from __future__ import annotations

from linfusion_cli.core.events import JobStarted, Planned, StageStarted, format_stage
from linfusion_cli.core.units import format_bytes, format_seconds


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
