"""Build the schedule of a phase, and count its UNet predictions for the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from linfusion_cli.sampling.guidance import build_guidance_filter
from linfusion_cli.sampling.phases import Phase
from linfusion_cli.sampling.schedulers.schedule import DrawStepNoise, Schedule, build_schedule, draw_zero_noise
from linfusion_cli.sampling.upscalers.demofusion import DemoFusion
from linfusion_cli.settings.request import Request


@dataclass(frozen=True)
class PassCount:
    """The number of a phase's `steps`, and of its predictions with guidance (two halves) and without."""

    steps: int
    guided: int
    unguided: int
    dilated: int = 0  # steps with an additional dilated prediction

    def count_forwards(self) -> int:
        """Return the number of UNet forwards with batch size 1."""
        return 2 * self.guided + self.unguided


def build_phase_schedule(
    request: Request, config: Mapping[str, Any], phase: Phase, draw: DrawStepNoise = draw_zero_noise
) -> Schedule | None:
    """Return the steps that `phase` runs, using the model's scheduler `config`; None if it runs no steps."""
    if phase.active_steps == 0:
        return None
    count = None if phase.from_noise else phase.active_steps
    return build_schedule(request.scheduler, config, phase.steps, draw, count, request.timestep_spacing)


def build_demofusion(request: Request, phase: Phase) -> DemoFusion:
    """Return the DemoFusion parameters of `phase`."""
    skip, dilated, blur = request.cosine
    return DemoFusion(phase.dilation, (skip, dilated, blur), request.blur_sigma, request.dilated_min)


def count_passes(request: Request, config: Mapping[str, Any], phase: Phase) -> PassCount:
    """Count the UNet predictions of `phase`. Raise the errors of `build_schedule`."""
    schedule = build_phase_schedule(request, config, phase)
    if schedule is None:
        return PassCount(0, 0, 0)
    applies = build_guidance_filter(schedule, phase.guidance_scale, request.guidance_interval)
    method, training_steps = build_demofusion(request, phase), schedule.training_steps
    dilated = [method.is_dilated(float(timestep), training_steps) for timestep in schedule.timesteps]
    runs = [1 + is_dilated for is_dilated in dilated]
    guided = sum(run for run, timestep in zip(runs, schedule.timesteps, strict=True) if applies(timestep))
    return PassCount(len(schedule), guided, sum(runs) - guided, sum(dilated))
