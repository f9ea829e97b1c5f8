"""Guidance in sequence and in batches, guidance intervals, and rescaling."""

import torch

from linfusion_cli.sampling.guidance import build_guidance_filter, guide, guide_batched, rescale_deviation
from linfusion_cli.sampling.schedulers.schedule import build_schedule, draw_zero_noise
from tests.support.small_models import build_scheduler_config

OPTIONS = {"scale": 5.0, "rescale": 0.0}
INPUTS = torch.zeros(1), torch.zeros(())  # latents, timestep


def always(timestep):
    """Use guidance at every timestep."""
    return True


def never(timestep):
    """Never use guidance."""
    return False


def constant_half(value, order=None):
    """Return a prediction function with the constant result `value`, which appends it to `order` on each call."""

    def predict(latents, timestep):
        if order is not None:
            order.append(value)
        return torch.full((1, 4, 2, 2), value)

    return predict


def test_guidance_is_the_weighted_difference_of_both_halves():
    order = []
    out = guide(constant_half(3.0, order), constant_half(1.0, order), **OPTIONS, applies=always)(*INPUTS)
    assert torch.equal(out, torch.full((1, 4, 2, 2), 11.0)) and sorted(order) == [1.0, 3.0]


def test_without_guidance_only_one_half_runs():
    order = []
    out = guide(constant_half(3.0, order), constant_half(1.0, order), **OPTIONS, applies=never)(*INPUTS)
    assert torch.equal(out, torch.full((1, 4, 2, 2), 3.0)) and order == [3.0]
    alone = guide_batched(constant_half(3.0, order), None, **OPTIONS, applies=never)(*INPUTS)
    assert torch.equal(alone, out)


def test_batched_halves_give_the_same_result():
    def both(latents, timestep):
        return torch.stack([torch.full((4, 2, 2), 1.0), torch.full((4, 2, 2), 3.0)])

    out = guide_batched(constant_half(3.0), both, **OPTIONS, applies=always)(torch.zeros(1, 4, 2, 2), torch.zeros(()))
    assert torch.equal(out, torch.full((1, 4, 2, 2), 11.0))


def test_an_interval_of_noise_levels_is_open_below_and_closed_above():
    schedule = build_schedule("euler", build_scheduler_config(), 8, draw_zero_noise)
    low, high = schedule.sigmas[5], schedule.sigmas[2]
    applies = build_guidance_filter(schedule, 7.5, (low, high))
    assert [applies(timestep) for timestep in schedule.timesteps] == [False] * 2 + [True] * 3 + [False] * 3
    assert all(map(build_guidance_filter(schedule, 7.5, ()), schedule.timesteps))
    assert not any(map(build_guidance_filter(schedule, 1.0, ()), schedule.timesteps))


def test_an_interval_may_have_no_upper_end():
    schedule = build_schedule("euler", build_scheduler_config(), 8, draw_zero_noise)
    applies = build_guidance_filter(schedule, 7.5, (schedule.sigmas[5], float("inf")))
    assert [applies(timestep) for timestep in schedule.timesteps] == [True] * 5 + [False] * 3


def test_rescaling_equals_diffusers():
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    mixed, conditional = torch.randn(2, 1, 4, 8, 8)
    torch.testing.assert_close(rescale_deviation(mixed, conditional, 0.7), rescale_noise_cfg(mixed, conditional, 0.7))
