"""The denoising loop: a generator that yields after each step; the caller shows, measures, saves, stops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from linfusion_cli.sampling.guidance import Predict


def denoise(latents: Tensor, scheduler: Any, timesteps: Tensor, predict: Predict) -> Iterator[Tensor]:
    """Run `scheduler` over `timesteps` from `latents` [B, C, H, W] in fp32, yielding the latents after each step."""
    for timestep in timesteps:
        prediction = predict(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
        yield latents
