"""The noise equals that of diffusers in the base, and does not depend on the size of maps in other phases."""

import torch

from linfusion_cli.sampling.noise import (
    BLOCK_LAT,
    SequentialNoise,
    draw_latent_noise,
    draw_phase_noise,
    draw_step_noise,
)


def test_the_noise_of_a_base_equals_that_of_diffusers():
    from diffusers.utils.torch_utils import randn_tensor

    for dtype in (torch.float32, torch.float16):
        generator, draw = torch.Generator("cpu").manual_seed(7), SequentialNoise(7, 4, 24, 40, dtype)
        for step in range(3):
            expected = randn_tensor((1, 4, 24, 40), generator=generator, device=torch.device("cpu"), dtype=dtype)
            assert torch.equal(draw(step), expected.float())


def test_noise_for_different_purposes_is_independent():
    drawn = [draw_phase_noise(3, 1, 1, 64, 64), draw_latent_noise(3, 1, 1, 64, 64)]
    drawn += [draw_step_noise(3, 1, 1, 64, 64, step) for step in range(3)]
    table = torch.corrcoef(torch.stack([noise.flatten() for noise in drawn]))
    assert (table - torch.eye(len(drawn))).abs().max() < 0.06


def test_phase_noise_does_not_depend_on_the_size_of_the_map():
    large = draw_phase_noise(3, 2, 4, 3 * BLOCK_LAT, 2 * BLOCK_LAT + 5)
    small = draw_phase_noise(3, 2, 4, BLOCK_LAT + 9, BLOCK_LAT + 1)
    assert torch.equal(large[..., : BLOCK_LAT + 9, : BLOCK_LAT + 1], small)


def test_phase_noise_differs_by_seed_phase_and_place():
    def corner(seed, phase, top, left):
        noise = draw_phase_noise(seed, phase, 1, 2 * BLOCK_LAT, 2 * BLOCK_LAT)
        return noise[..., top : top + BLOCK_LAT, left : left + BLOCK_LAT]

    blocks = [corner(*place) for place in [(0, 1, 0, 0), (1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 64, 0), (0, 1, 0, 64)]]
    for i, block in enumerate(blocks):
        for other in blocks[:i]:
            assert torch.corrcoef(torch.stack([block.flatten(), other.flatten()]))[0, 1].abs() < 0.06


def test_phase_noise_is_normal():
    noise = draw_phase_noise(0, 1, 4, 256, 256)
    assert noise.mean().abs() < 0.01 and (noise.std() - 1).abs() < 0.01
