"""Draw the noise of a run, always on the CPU: results must not depend on the device."""

import torch
from torch import Tensor

BLOCK_LAT = 64
POSTERIOR_STREAM, STEP_STREAM = 1, 2  # independent noise streams, in addition to the initial noise of a phase


class SequentialNoise:
    """The noise of a base phase [1, C, H, W], drawn in sequence as a diffusers pipeline in `dtype` does for the seed.

    The first call returns the initial noise; the following calls return the noise that the scheduler adds.
    """

    def __init__(self, seed: int, channels: int, height_lat: int, width_lat: int, dtype: torch.dtype):
        self._shape, self._dtype = (1, channels, height_lat, width_lat), dtype
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, step: int = 0) -> Tensor:
        """Return the next noise in fp32. `step` is ignored."""
        return torch.randn(self._shape, generator=self._generator, dtype=self._dtype).float()

    def get_state(self) -> Tensor:
        """Return the state of the generator."""
        return self._generator.get_state()

    def set_state(self, state: Tensor) -> None:
        """Restore a state of the generator."""
        self._generator.set_state(state)


def draw_phase_noise(seed: int, phase: int, channels: int, height_lat: int, width_lat: int) -> Tensor:
    """Return the initial noise of a phase [1, C, H, W] in fp32.

    Each block of 64 x 64 latents has its own generator, seeded by the block's position. The noise in a block therefore
    depends neither on the size of the map nor on how it is split.
    """
    return _draw_blocks((seed, phase), channels, height_lat, width_lat)


def draw_latent_noise(seed: int, phase: int, channels: int, height_lat: int, width_lat: int) -> Tensor:
    """Return independent noise, as `draw_phase_noise` does, for a sample of the VAE's posterior."""
    return _draw_blocks((seed, phase, POSTERIOR_STREAM), channels, height_lat, width_lat)


def draw_step_noise(seed: int, phase: int, channels: int, height_lat: int, width_lat: int, step: int) -> Tensor:
    """Return independent noise, as `draw_phase_noise` does, for the scheduler to add in a step."""
    return _draw_blocks((seed, phase, STEP_STREAM, step), channels, height_lat, width_lat)


def _draw_blocks(counters: tuple[int, ...], channels: int, height_lat: int, width_lat: int) -> Tensor:
    noise = torch.empty(1, channels, height_lat, width_lat)
    for top in range(0, height_lat, BLOCK_LAT):
        for left in range(0, width_lat, BLOCK_LAT):
            part = noise[..., top : top + BLOCK_LAT, left : left + BLOCK_LAT]
            block = _draw_block(_hash_counters(*counters, top // BLOCK_LAT, left // BLOCK_LAT), channels)
            part.copy_(block[..., : part.shape[-2], : part.shape[-1]])
    return noise


def _draw_block(seed: int, channels: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, channels, BLOCK_LAT, BLOCK_LAT), generator=generator)


def _hash_counters(*counters: int) -> int:
    """Hash seed, phase, row and column to 63 bits, using splitmix64's finaliser (Steele et al., OOPSLA 2014)."""
    state = 0
    for counter in counters:
        state = (state ^ counter) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
