"""The denoising loop: a generator that yields after each step; the caller shows, measures, saves, stops."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from linfusion_cli.sampling.guidance import Predict
from linfusion_cli.sampling.schedulers.schedule import Schedule


def denoise(latents: Tensor, schedule: Schedule, predict: Predict, done: int = 0) -> Iterator[Tensor]:
    """Take the steps of `schedule` from `latents` [1, C, h, w] in fp32, yielding the latents after each.

    `latents` are those after the first `done` of them.
    """
    for step, timestep in enumerate(schedule.timesteps[done:], done):
        prediction = predict(schedule.scale_model_input(latents, step), timestep)
        latents = schedule.step(prediction, step, latents)
        yield latents


def sdedit(encoded: Tensor, noise: Tensor, schedule: Schedule, predict: Predict) -> Iterator[Tensor]:
    """SDEdit (Meng et al., arXiv 2108.01073): noise the encoded picture [1, C, h, w] to the first step, and denoise."""
    return denoise(schedule.add_noise(encoded, noise, 0), schedule, predict)
