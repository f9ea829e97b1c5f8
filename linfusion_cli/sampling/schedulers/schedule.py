"""Which scheduler runs, and which of its steps a phase takes."""

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

ASKED = "randn_tensor"
Draw = Callable[[int], Tensor]  # index of a step -> the noise [1, C, h, w] that a scheduler adds in it


@dataclass(frozen=True)
class Solver:
    """A scheduler of diffusers, and what distinguishes it from its like.

    `anywhere`: it can start at any step; `takes_sample`: models that predict the sample itself can be run.
    """

    kind: type
    options: Mapping[str, Any]
    anywhere: bool = True
    takes_sample: bool = True


LATENTS = {"clip_sample": False, "thresholding": False}  # the others' defaults are for pixels between -1 and 1
DPMPP = {"algorithm_type": "dpmsolver++", "solver_order": 2, "thresholding": False}
SOLVERS = {
    "euler": Solver(EulerDiscreteScheduler, {}),
    "euler-a": Solver(EulerAncestralDiscreteScheduler, {}, takes_sample=False),
    "ddim": Solver(DDIMScheduler, LATENTS),
    "dpmpp-2m": Solver(DPMSolverMultistepScheduler, DPMPP | {"use_karras_sigmas": False}),
    "dpmpp-2m-karras": Solver(DPMSolverMultistepScheduler, DPMPP | {"use_karras_sigmas": True}),
    "dpmpp-2m-sde": Solver(DPMSolverMultistepScheduler, DPMPP | {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Solver(UniPCMultistepScheduler, {"thresholding": False}),
    "lcm": Solver(LCMScheduler, LATENTS),
    "pndm": Solver(PNDMScheduler, {"skip_prk_steps": True}, anywhere=False, takes_sample=False),
}


@dataclass(frozen=True)
class Schedule:
    """The steps of one phase: `timesteps` [S] from the noisiest down, and the noise over signal before each.

    `draw` gives the noise that some schedulers add in a step; the others do not ask.
    """

    scheduler: Any
    timesteps: Tensor
    sigmas: list[float]
    draw: Draw
    fresh: Mapping[str, Any]  # the scheduler's attributes before the first step

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def training_steps(self) -> int:
        """T: how many timesteps the model was trained with."""
        return self.scheduler.config.num_train_timesteps

    def state(self) -> dict[str, Any]:
        """What steps have changed in the scheduler: numbers, tensors that nobody writes over, and lists of them."""
        now = attributes(self.scheduler)
        return {name: now[name] for name in now if now[name] is not self.fresh.get(name)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the scheduler what it was when it had this `state`; its tensors are on the latents' device."""
        for name, value in attributes(state).items():
            setattr(self.scheduler, name, value)

    def scale_noise(self, noise: Tensor) -> Tensor:
        """Noise [1, C, h, w] as the latents that a picture begins with."""
        return noise * self.scheduler.init_noise_sigma

    def add_noise(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        """`latents` [1, C, h, w] with `noise`, as they are before `step`, which is the next to be taken."""
        return self.scheduler.add_noise(latents, noise, self.timesteps[step : step + 1])

    def scale_model_input(self, latents: Tensor, step: int) -> Tensor:
        """`latents` as the model takes them before `step`."""
        return self.scheduler.scale_model_input(latents, self.timesteps[step])

    def step(self, prediction: Tensor, step: int, latents: Tensor) -> Tensor:
        """`latents` after `step`, by the model's `prediction` for them.

        Raises NonFinite for a prediction with NaN or Inf before the scheduler step, so its state stays valid.
        """
        if not prediction.isfinite().all():
            raise NonFinite(f"The model predicts NaN or Inf at step {step + 1} of {len(self)}.")
        with supply_noise(self.scheduler, lambda: self.draw(step)):
            return self.scheduler.step(prediction, self.timesteps[step], latents).prev_sample


def attributes(scheduler: Any) -> dict[str, Any]:
    """A scheduler's, or a state's; lists are copied, as schedulers change their own."""
    values = scheduler if isinstance(scheduler, Mapping) else vars(scheduler)
    return {name: list(value) if isinstance(value, list) else value for name, value in values.items()}


@contextmanager
def supply_noise(scheduler: Any, draw: Callable[[], Tensor]) -> Iterator[None]:
    """Within, the noise that `scheduler` adds comes from `draw`.

    What it draws by itself would depend on how latents are cut. Few schedulers take noise as an argument, but all ask
    the same function for it, by the name under which their module has imported it.
    """
    module = sys.modules[type(scheduler).__module__]
    if not hasattr(module, ASKED):  # this one never adds noise
        yield
        return
    original = getattr(module, ASKED)
    setattr(module, ASKED, lambda shape, *, device=None, dtype=None, **_: draw().to(device, dtype))
    try:
        yield
    finally:
        setattr(module, ASKED, original)


def make_schedule(
    name: str, config: Mapping[str, Any], steps: int, draw: Draw, count: int | None = None, spacing: str = "auto"
) -> Schedule:
    """The last `count` of `steps` steps of the scheduler `name`, on the noise schedule in a model's `config`.

    `spacing` is how timesteps are spread, `auto` as the config says. Raises DataError for a config that diffusers does
    not know, UsageError for steps that this scheduler cannot take.
    """
    scheduler = make_scheduler(name, config, spacing)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise too_many_steps(name, steps) from error
    count = len(scheduler.timesteps) if count is None else count
    begin = len(scheduler.timesteps) - count
    if begin and not SOLVERS[name].anywhere:
        reason = f"--scheduler {name} cannot start in the middle, as the phases above the base do."
        names = ", ".join(other for other, solver in SOLVERS.items() if solver.anywhere)
        raise UsageError(reason, f"Use one of {names}.", "scheduler")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    sigmas = noise_levels(scheduler)
    if steps > 1 and sigmas[0] <= sigmas[-1]:  # spread so thinly that all are the same
        raise too_many_steps(name, steps)
    return Schedule(scheduler, scheduler.timesteps[begin:], sigmas[begin:], draw, attributes(scheduler))


def make_scheduler(name: str, config: Mapping[str, Any], spacing: str) -> Any:
    """The scheduler `name`, without steps yet."""
    solver = SOLVERS[name]
    if config.get("prediction_type") == "sample" and not solver.takes_sample:
        reason = f"--scheduler {name} cannot run a model that predicts the sample."
        raise UsageError(reason, "Use ddim, or leave --scheduler out.", "scheduler")
    spaced = {} if spacing == "auto" else {"timestep_spacing": spacing}
    try:
        return solver.kind.from_config(dict(config), **solver.options, **spaced)
    except (NotImplementedError, ValueError, TypeError) as error:
        reason = f"The model's scheduler_config.json cannot be used ({first_line(error)})."
        raise DataError(reason, "Download the model again.") from error


def too_many_steps(name: str, steps: int) -> UsageError:
    return UsageError(f"--steps {steps} is too many for --scheduler {name}.", "Use fewer steps.", "steps")


def noise_levels(scheduler: Any) -> list[float]:
    """σ, the deviation of noise over that of signal, before each of a scheduler's steps."""
    timesteps = scheduler.timesteps
    if hasattr(scheduler, "sigmas"):
        return [float(sigma) for sigma in scheduler.sigmas[: len(timesteps)]]
    signal = scheduler.alphas_cumprod.double()[timesteps]
    return ((1 - signal) / signal).sqrt().tolist()


def zero_noise(step: int) -> Tensor:
    """The Draw of a schedule that is only looked at."""
    return torch.zeros(())
