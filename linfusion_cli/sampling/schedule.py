"""Which scheduler runs, and which of its steps a phase takes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from linfusion_cli.errors import DataError, first_line


def euler(config: dict[str, Any], steps: int) -> EulerDiscreteScheduler:
    """Euler's method (Karras et al., arXiv 2206.00364, algorithm 1) on the model's own noise schedule.

    Raises DataError for a schedule that diffusers does not know.
    """
    try:
        scheduler = EulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(steps)
    except (NotImplementedError, ValueError, TypeError) as error:
        reason = f"The model's scheduler_config.json cannot be used ({first_line(error)})."
        raise DataError(reason, "Download the model again.") from error
    return scheduler


def phase_strengths(strength: float, phases: int) -> list[float]:
    """The strength of each phase after the base: `linspace(strength, 0, phases + 1)` without its last."""
    return [float(value) for value in np.linspace(strength, 0, phases + 1)[:-1]]


def steps_run(strength: float, steps: int) -> int:
    """How many of the schedule's last steps a phase runs: ceil(steps · strength), the strength in float32 (§5)."""
    return min(steps, math.ceil(np.float32(steps) * np.float32(strength)))


def last_steps(scheduler: EulerDiscreteScheduler, count: int) -> Tensor:
    """The last `count` timesteps [count], with the scheduler set to begin there."""
    begin = len(scheduler.timesteps) - count
    scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]
