"""The denoising loop, and SDEdit on top of it. Generators yield after each step, so callers can show or save it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from linfusion_cli.sampling.guidance import Predict
from linfusion_cli.sampling.schedulers.schedule import Schedule


def denoise(latents: Tensor, schedule: Schedule, predict: Predict, steps_done: int = 0) -> Iterator[Tensor]:
    """Run the steps of `schedule` on `latents` [1, C, h, w] in fp32 and yield the latents after each.

    The first `steps_done` steps are skipped: `latents` are their result.
    """
    for step, timestep in enumerate(schedule.timesteps[steps_done:], steps_done):
        prediction = predict(schedule.scale_model_input(latents, step), timestep)
        latents = schedule.step(prediction, step, latents)
        yield latents


def sdedit(encoded: Tensor, noise: Tensor, schedule: Schedule, predict: Predict) -> Iterator[Tensor]:
    """Add noise to the encoded image [1, C, h, w] and denoise it: SDEdit (Meng et al., arXiv 2108.01073)."""
    return denoise(schedule.add_noise(encoded, noise, 0), schedule, predict)
