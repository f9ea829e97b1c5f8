"""DemoFusion (Du et al., arXiv 2311.16973), in the variant of LinFusion (arXiv 2409.02097).

The complete image is denoised at once, without patches. Two parts of the paper remain: the skip residual, which keeps
the image close to the upscaled one, and dilated sampling, which preserves the UNet's relative receptive field.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion_cli.sampling.guidance import Predict
from linfusion_cli.sampling.schedulers.schedule import Schedule


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and sample standard deviation of each channel of latents, both [1, C, 1, 1]."""

    mean: Tensor
    deviation: Tensor

    @staticmethod
    def from_latents(latents: Tensor) -> ChannelStatistics:
        """Return the statistics of `latents` [1, C, h, w]."""
        deviation, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True)
        return ChannelStatistics(mean, deviation)

    def apply_to(self, latents: Tensor) -> Tensor:
        """Shift and scale `latents` to this mean and deviation. A constant channel is only shifted."""
        own, target = ChannelStatistics.from_latents(latents), self.to(latents.device)
        scale = torch.where(own.deviation > 0, target.deviation / own.deviation, torch.ones_like(own.deviation))
        return (latents - own.mean) * scale + target.mean

    def to(self, device: torch.device) -> ChannelStatistics:
        """Return the statistics on `device`."""
        return ChannelStatistics(self.mean.to(device), self.deviation.to(device))


@dataclass(frozen=True)
class DemoFusion:
    """The parameters of the method: exponents of the three cosines, and the blur's sigma g.

    `dilation` is the ratio of the phase's size to that of the base. The dilated pass is skipped while its weight is
    less than `dilated_min`; 0 never skips it.
    """

    dilation: int
    exponents: tuple[float, float, float] = (3.0, 1.0, 1.0)
    blur_sigma: float = 0.8
    dilated_min: float = 0.01

    def is_dilated(self, timestep: float, training_steps: int) -> bool:
        """Return whether the step at `timestep` runs the dilated pass. At dilation 1 it would equal the plain pass."""
        weight = cosines(timestep, training_steps, self.exponents)[1]
        return self.dilation > 1 and weight > 0 and weight >= self.dilated_min


def cosines(timestep: float, training_steps: int, exponents: tuple[float, float, float]) -> list[float]:
    """Return c1, c2, c3: `cf` to each exponent, cf = (1 + cos(π (T - t) / T)) / 2. c3 ends at 0.01 instead of 0."""
    cf = (1 + math.cos(math.pi * (training_steps - timestep) / training_steps)) / 2
    skip, dilated, blur = (cf**exponent for exponent in exponents)
    return [skip, dilated, 0.99 * blur + 0.01]


def demofusion(
    encoded: Tensor,
    noise: Tensor,
    base: ChannelStatistics,
    schedule: Schedule,
    predict: Predict,
    predict_dilated: Predict,
    method: DemoFusion,
    resume_latents: Tensor | None = None,
    steps_done: int = 0,
) -> Iterator[Tensor]:
    """Denoise the encoded and upscaled image [1, C, h, w] and yield the latents after each step of `schedule`.

    To resume, pass the latents after the first `steps_done` steps as `resume_latents`. `predict` and `predict_dilated`
    are the guided predictions of the UNet without dilation, and with all convolutions dilated by `method.dilation`.
    The last latents have the mean and deviation of `base`.
    """
    latents = schedule.add_noise(encoded, noise, 0) if resume_latents is None else resume_latents
    for step, timestep in enumerate(schedule.timesteps[steps_done:], steps_done):
        time = float(timestep)
        skip, dilated, blur = cosines(time, schedule.training_steps, method.exponents)
        latents = torch.lerp(latents, schedule.add_noise(encoded, noise, step), skip)
        prediction = predict(schedule.scale_model_input(latents, step), timestep)
        if method.is_dilated(time, schedule.training_steps):
            smooth = ChannelStatistics.from_latents(latents).apply_to(
                blur_latents(latents, 2 * method.dilation - 1, method.blur_sigma * blur)
            )
            prediction = torch.lerp(
                prediction, predict_dilated(schedule.scale_model_input(smooth, step), timestep), dilated
            )
        latents = schedule.step(prediction, step, latents)
        if step == len(schedule) - 1:
            latents = base.apply_to(latents)
        yield latents


def blur_latents(latents: Tensor, size: int, sigma: float) -> Tensor:
    """Blur `latents` [1, C, h, w] with a Gaussian of `size` x `size` taps and deviation `sigma`, with zero padding.

    Rows and columns are filtered by summing shifted latents, in fp32 on every device. A convolution can use TF32.
    """
    taps = gaussian(size, sigma)
    for dim in (-1, -2):
        reach, length = size // 2, latents.shape[dim]
        padded = F.pad(latents, (reach, reach) if dim == -1 else (0, 0, reach, reach))
        latents = torch.zeros_like(latents)
        for shift, weight in enumerate(taps):
            if weight:
                latents += weight * padded.narrow(dim, shift, length)
    return latents


def gaussian(size: int, sigma: float) -> list[float]:
    """Return `size` taps of a Gaussian of deviation `sigma`, normalised to a sum of 1."""
    taps = [math.exp(-((place - (size - 1) / 2) ** 2) / (2 * sigma**2)) for place in range(size)]
    return [tap / sum(taps) for tap in taps]
