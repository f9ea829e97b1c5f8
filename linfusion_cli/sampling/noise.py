"""The noise of a run, always drawn on the CPU so that it does not depend on the device."""

import torch
from torch import Tensor

BLOCK_LAT = 64
LATENTS, STEPS = 1, 2  # beside seed and phase, what else noise is drawn for


class SequentialNoise:
    """The noise of a base [1, C, H, W], call by call as a diffusers pipeline in `dtype` draws it for this seed.

    The first is what it starts with, the others what its scheduler adds.
    """

    def __init__(self, seed: int, channels: int, height_lat: int, width_lat: int, dtype: torch.dtype):
        self._shape, self._dtype = (1, channels, height_lat, width_lat), dtype
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, step: int = 0) -> Tensor:
        """The next noise, in fp32, whatever the step."""
        return torch.randn(self._shape, generator=self._generator, dtype=self._dtype).float()

    def state(self) -> Tensor:
        """What the generator is at: from here it goes on to draw the same."""
        return self._generator.get_state()

    def load_state_dict(self, state: Tensor) -> None:
        """Draw on from a `state` that was."""
        self._generator.set_state(state)


def phase_noise(seed: int, phase: int, channels: int, height_lat: int, width_lat: int) -> Tensor:
    """The noise of one phase -> [1, C, H, W] in fp32.

    Every block of 64 x 64 latents has its own generator, seeded by its place: what a block holds does not depend on
    how the map is cut, nor on its size.
    """
    return _in_blocks((seed, phase), channels, height_lat, width_lat)


def latent_noise(seed: int, phase: int, channels: int, height_lat: int, width_lat: int) -> Tensor:
    """As `phase_noise`, for the draw from the VAE's distribution that the phase begins with: independent of it."""
    return _in_blocks((seed, phase, LATENTS), channels, height_lat, width_lat)


def step_noise(seed: int, phase: int, channels: int, height_lat: int, width_lat: int, step: int) -> Tensor:
    """As `phase_noise`, for what a scheduler adds in a step."""
    return _in_blocks((seed, phase, STEPS, step), channels, height_lat, width_lat)


def _in_blocks(counters: tuple[int, ...], channels: int, height_lat: int, width_lat: int) -> Tensor:
    noise = torch.empty(1, channels, height_lat, width_lat)
    for top in range(0, height_lat, BLOCK_LAT):
        for left in range(0, width_lat, BLOCK_LAT):
            part = noise[..., top : top + BLOCK_LAT, left : left + BLOCK_LAT]
            block = _block(_block_seed(*counters, top // BLOCK_LAT, left // BLOCK_LAT), channels)
            part.copy_(block[..., : part.shape[-2], : part.shape[-1]])
    return noise


def _block(seed: int, channels: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, channels, BLOCK_LAT, BLOCK_LAT), generator=generator)


def _block_seed(*counters: int) -> int:
    """Mix seed, phase, row and column into 63 bits: splitmix64's finaliser (Steele et al., OOPSLA 2014) per counter."""
    state = 0
    for counter in counters:
        state = (state ^ counter) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
