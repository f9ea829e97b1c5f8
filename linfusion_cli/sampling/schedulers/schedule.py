"""Build diffusers schedulers by name, and select the steps that a phase runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from linfusion_cli.core.errors import DataError, NonFinite, UsageError, first_line

RANDN_NAME = "randn_tensor"
DrawStepNoise = Callable[[int], Tensor]  # step index -> noise [1, C, h, w] for the scheduler to add


@dataclass(frozen=True)
class SchedulerSpec:
    """A diffusers scheduler, its fixed options, and its capabilities.

    `can_start_midway`: it can start at any step. `supports_sample`: it supports models that predict the sample.
    """

    scheduler_class: type
    options: Mapping[str, Any]
    can_start_midway: bool = True
    supports_sample: bool = True


LATENT_OPTIONS = {"clip_sample": False, "thresholding": False}  # the defaults are for pixels in [-1, 1]
DPMPP_OPTIONS = {"algorithm_type": "dpmsolver++", "solver_order": 2, "thresholding": False}
SCHEDULER_SPECS = {
    "euler": SchedulerSpec(EulerDiscreteScheduler, {}),
    "euler-a": SchedulerSpec(EulerAncestralDiscreteScheduler, {}, supports_sample=False),
    "ddim": SchedulerSpec(DDIMScheduler, LATENT_OPTIONS),
    "dpmpp-2m": SchedulerSpec(DPMSolverMultistepScheduler, DPMPP_OPTIONS | {"use_karras_sigmas": False}),
    "dpmpp-2m-karras": SchedulerSpec(DPMSolverMultistepScheduler, DPMPP_OPTIONS | {"use_karras_sigmas": True}),
    "dpmpp-2m-sde": SchedulerSpec(DPMSolverMultistepScheduler, DPMPP_OPTIONS | {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": SchedulerSpec(UniPCMultistepScheduler, {"thresholding": False}),
    "lcm": SchedulerSpec(LCMScheduler, LATENT_OPTIONS),
    "pndm": SchedulerSpec(PNDMScheduler, {"skip_prk_steps": True}, can_start_midway=False, supports_sample=False),
}


@dataclass(frozen=True)
class Schedule:
    """The steps of one phase: `timesteps` [S] in descending order, and the noise-to-signal ratio before each step.

    `draw` returns the noise of a step, for schedulers that add noise.
    """

    scheduler: Any
    timesteps: Tensor
    sigmas: list[float]
    draw: DrawStepNoise
    initial_attributes: Mapping[str, Any]  # the scheduler's attributes before the first step

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.timesteps)

    @property
    def training_steps(self) -> int:
        """T, the number of timesteps that the model was trained with."""
        return self.scheduler.config.num_train_timesteps

    def state_dict(self) -> dict[str, Any]:
        """Return the attributes that steps have changed: numbers, tensors (not modified in place), and lists."""
        current = copy_attributes(self.scheduler)
        return {name: current[name] for name in current if current[name] is not self.initial_attributes.get(name)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a scheduler state. Its tensors must be on the device of the latents."""
        for name, value in copy_attributes(state).items():
            setattr(self.scheduler, name, value)

    def scale_noise(self, noise: Tensor) -> Tensor:
        """Scale noise [1, C, h, w] to the initial latents of an image."""
        return noise * self.scheduler.init_noise_sigma

    def add_noise(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        """Add `noise` to `latents` [1, C, h, w] at the noise level before `step`, which must be the next step."""
        return self.scheduler.add_noise(latents, noise, self.timesteps[step : step + 1])

    def scale_model_input(self, latents: Tensor, step: int) -> Tensor:
        """Scale `latents` to the input of the model at `step`."""
        return self.scheduler.scale_model_input(latents, self.timesteps[step])

    def step(self, prediction: Tensor, step: int, latents: Tensor) -> Tensor:
        """Return the latents after `step`, given the model's `prediction` for `latents`.

        Raise NonFinite for a prediction with NaN or Inf, before the state of the scheduler changes.
        """
        if not prediction.isfinite().all():
            raise NonFinite(f"The model predicts NaN or Inf at step {step + 1} of {len(self)}.")
        with supply_noise(self.scheduler, lambda: self.draw(step)):
            return self.scheduler.step(prediction, self.timesteps[step], latents).prev_sample


def copy_attributes(scheduler: Any) -> dict[str, Any]:
    """Return the attributes of a scheduler, or of its state. Lists are copied, because schedulers modify theirs."""
    values = scheduler if isinstance(scheduler, Mapping) else vars(scheduler)
    return {name: list(value) if isinstance(value, list) else value for name, value in values.items()}


@contextmanager
def supply_noise(scheduler: Any, draw: Callable[[], Tensor]) -> Iterator[None]:
    """Make `scheduler` add noise from `draw` within the context, instead of noise that depends on the size of latents.

    Few schedulers accept noise as an argument, but all of them call `randn_tensor`, which their module imports. That
    name is replaced in the module.
    """
    module = sys.modules[type(scheduler).__module__]
    if not hasattr(module, RANDN_NAME):  # this scheduler never adds noise
        yield
        return
    original = getattr(module, RANDN_NAME)
    setattr(module, RANDN_NAME, lambda shape, *, device=None, dtype=None, **_: draw().to(device, dtype))
    try:
        yield
    finally:
        setattr(module, RANDN_NAME, original)


def build_schedule(
    name: str,
    config: Mapping[str, Any],
    steps: int,
    draw: DrawStepNoise,
    count: int | None = None,
    spacing: str = "auto",
) -> Schedule:
    """Return the last `count` of `steps` steps of the scheduler `name`, with the noise schedule of a model's `config`.

    `spacing` is the timestep spacing, or `auto` for that of the config. Raise DataError if diffusers rejects the
    config, and UsageError if the scheduler does not support these steps.
    """
    scheduler = build_scheduler(name, config, spacing)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise build_too_many_steps_error(name, steps) from error
    count = len(scheduler.timesteps) if count is None else count
    begin = len(scheduler.timesteps) - count
    if begin and not SCHEDULER_SPECS[name].can_start_midway:
        reason = f"--scheduler {name} cannot start in the middle of its schedule, as upscaling requires."
        names = ", ".join(other for other, spec in SCHEDULER_SPECS.items() if spec.can_start_midway)
        raise UsageError(reason, f"Use one of {names}.", "scheduler")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    sigmas = compute_sigmas(scheduler)
    if steps > 1 and sigmas[0] <= sigmas[-1]:  # timesteps are equal
        raise build_too_many_steps_error(name, steps)
    return Schedule(scheduler, scheduler.timesteps[begin:], sigmas[begin:], draw, copy_attributes(scheduler))


def build_scheduler(name: str, config: Mapping[str, Any], spacing: str) -> Any:
    """Return the scheduler `name`, without timesteps. The errors are those of `build_schedule`."""
    spec = SCHEDULER_SPECS[name]
    if config.get("prediction_type") == "sample" and not spec.supports_sample:
        reason = f"--scheduler {name} does not support models that predict the sample."
        raise UsageError(reason, "Use --scheduler ddim or the default.", "scheduler")
    spaced = {} if spacing == "auto" else {"timestep_spacing": spacing}
    try:
        return spec.scheduler_class.from_config(dict(config), **spec.options, **spaced)
    except (NotImplementedError, ValueError, TypeError) as error:
        reason = f"The model's scheduler_config.json is invalid ({first_line(error)})."
        raise DataError(reason, "Download the model again.") from error


def build_too_many_steps_error(name: str, steps: int) -> UsageError:
    """Return the error for more steps than the scheduler supports."""
    return UsageError(f"--steps {steps} is too many for --scheduler {name}.", "Use fewer steps.", "steps")


def compute_sigmas(scheduler: Any) -> list[float]:
    """Return σ, the noise-to-signal ratio, before each step of a scheduler."""
    timesteps = scheduler.timesteps
    if hasattr(scheduler, "sigmas"):
        return [float(sigma) for sigma in scheduler.sigmas[: len(timesteps)]]
    signal = scheduler.alphas_cumprod.double()[timesteps]
    return ((1 - signal) / signal).sqrt().tolist()


def draw_zero_noise(step: int) -> Tensor:
    """Return a scalar zero, for schedules that are inspected and not run."""
    return torch.zeros(())
