"""DemoFusion (Du et al., arXiv 2311.16973), in the form in which LinFusion (arXiv 2409.02097) runs it.

The whole picture is denoised at once, so there are no patches. What is left of the paper: the skip residual, which
holds the picture to the one it grew from, and dilated sampling, in which the network sees as far as it did at the base.
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
    """Mean and deviation (n - 1) of each channel of latents, both [1, C, 1, 1]."""

    mean: Tensor
    deviation: Tensor

    @staticmethod
    def of(latents: Tensor) -> ChannelStatistics:
        """Of `latents` [1, C, h, w]."""
        deviation, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True)
        return ChannelStatistics(mean, deviation)

    def given_to(self, latents: Tensor) -> Tensor:
        """`latents` shifted and scaled to this mean and deviation; a channel without any keeps its own deviation."""
        own, wanted = ChannelStatistics.of(latents), self.to(latents.device)
        scale = torch.where(own.deviation > 0, wanted.deviation / own.deviation, torch.ones_like(own.deviation))
        return (latents - own.mean) * scale + wanted.mean

    def to(self, device: torch.device) -> ChannelStatistics:
        return ChannelStatistics(self.mean.to(device), self.deviation.to(device))


@dataclass(frozen=True)
class DemoFusion:
    """The method's numbers: exponents of the three cosines, g of the blur, and `dilation`, phase over base size.

    Below the weight `dilated_min` the dilated pass is left out; 0 runs it always.
    """

    dilation: int
    exponents: tuple[float, float, float] = (3.0, 1.0, 1.0)
    blur_sigma: float = 0.8
    dilated_min: float = 0.01

    def is_dilated(self, timestep: float, training_steps: int) -> bool:
        """Whether the step at `timestep` runs the dilated pass; at dilation 1 it would be the plain one."""
        weight = cosines(timestep, training_steps, self.exponents)[1]
        return self.dilation > 1 and weight > 0 and weight >= self.dilated_min


def cosines(timestep: float, training_steps: int, exponents: tuple[float, float, float]) -> list[float]:
    """c1, c2 and c3: `cf` to the power of each exponent, cf = (1 + cos(π (T - t) / T)) / 2; c3 ends at 0.01, not 0."""
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
    reached: Tensor | None = None,
    done: int = 0,
) -> Iterator[Tensor]:
    """Denoise the encoded, enlarged picture [1, C, h, w] from the first step of `schedule`, yielding after each step.

    Or go on from the latents that were `reached` after the first `done` steps.

    `predict` and `predict_dilated` are the guided predictions of the UNet as it is, and with all its convolutions
    dilated by `method.dilation`. The last latents have the mean and deviation of `base`.
    """
    latents = schedule.add_noise(encoded, noise, 0) if reached is None else reached
    for step, timestep in enumerate(schedule.timesteps[done:], done):
        at = float(timestep)
        skip, dilated, blur = cosines(at, schedule.training_steps, method.exponents)
        latents = torch.lerp(latents, schedule.add_noise(encoded, noise, step), skip)
        prediction = predict(schedule.scale_model_input(latents, step), timestep)
        if method.is_dilated(at, schedule.training_steps):
            smooth = ChannelStatistics.of(latents).given_to(
                blurred(latents, 2 * method.dilation - 1, method.blur_sigma * blur)
            )
            prediction = torch.lerp(
                prediction, predict_dilated(schedule.scale_model_input(smooth, step), timestep), dilated
            )
        latents = schedule.step(prediction, step, latents)
        if step == len(schedule) - 1:
            latents = base.given_to(latents)
        yield latents


def blurred(latents: Tensor, size: int, sigma: float) -> Tensor:
    """`latents` [1, C, h, w] blurred by a Gaussian of `size` x `size` taps and deviation `sigma`, zeros around them.

    Rows, then columns, each as a sum of shifted latents: exact in fp32 on any device, where a convolution may round.
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
    """`size` taps of a Gaussian of deviation `sigma`, which sum to 1."""
    taps = [math.exp(-((place - (size - 1) / 2) ** 2) / (2 * sigma**2)) for place in range(size)]
    return [tap / sum(taps) for tap in taps]
