"""Where a phase starts: pure noise for the base, the noised upscaled picture afterwards."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def base_start(scheduler: Any, noise: Tensor) -> Tensor:
    """Noise [1, C, H, W] at the schedule's first step; the scheduler must not have begun."""
    return noise * scheduler.init_noise_sigma


def sdedit_start(scheduler: Any, timesteps: Tensor, encoded: Tensor, noise: Tensor) -> Tensor:
    """SDEdit (Meng et al., arXiv 2108.01073): the encoded picture [1, C, H, W] noised to the first of `timesteps`."""
    return scheduler.add_noise(encoded, noise, timesteps[:1])
