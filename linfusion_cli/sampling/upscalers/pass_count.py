"""The schedule of a phase, and how often it runs the UNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from linfusion_cli.sampling.guidance import where_guided
from linfusion_cli.sampling.phases import Phase
from linfusion_cli.sampling.schedulers.schedule import Draw, Schedule, make_schedule, zero_noise
from linfusion_cli.sampling.upscalers.demofusion import DemoFusion
from linfusion_cli.settings.request import ImageRequest


@dataclass(frozen=True)
class Passes:
    """A phase's `steps`, and its predictions, plain and dilated: those with both halves of guidance, and the others."""

    steps: int
    guided: int
    unguided: int
    dilated: int = 0  # how many of both are

    def forwards(self) -> int:
        """Runs of the UNet on one half."""
        return 2 * self.guided + self.unguided


def phase_schedule(
    request: ImageRequest, config: Mapping[str, Any], phase: Phase, draw: Draw = zero_noise
) -> Schedule | None:
    """The steps that `phase` runs, on the noise schedule in the model's `config`; None if there are none."""
    if phase.count == 0:
        return None
    count = None if phase.from_noise else phase.count
    return make_schedule(request.scheduler, config, phase.steps, draw, count, request.timestep_spacing)


def demofusion_of(request: ImageRequest, phase: Phase) -> DemoFusion:
    """The numbers of the method for `phase`."""
    return DemoFusion(phase.dilation, request.cosine, request.blur_sigma, request.dilated_min)


def count_passes(request: ImageRequest, config: Mapping[str, Any], phase: Phase) -> Passes:
    """How often `phase` runs the UNet; raises as `make_schedule` does."""
    schedule = phase_schedule(request, config, phase)
    if schedule is None:
        return Passes(0, 0, 0)
    applies = where_guided(schedule, phase.guidance_scale, request.guidance_interval)
    method, total = demofusion_of(request, phase), schedule.training_steps
    dilated = [method.is_dilated(float(timestep), total) for timestep in schedule.timesteps]
    runs = [1 + also_dilated for also_dilated in dilated]
    guided = sum(run for run, timestep in zip(runs, schedule.timesteps, strict=True) if applies(timestep))
    return Passes(len(schedule), guided, sum(runs) - guided, sum(dilated))
