import torch

from linfusion_cli.sampling.guidance import guided, guided_together, rescaled, where_guided
from linfusion_cli.sampling.schedulers.schedule import make_schedule, zero_noise
from tests.support.small_models import scheduler_config

HOW = {"scale": 5.0, "rescale": 0.0}


def always(timestep):
    return True


def never(timestep):
    return False


def half(value, order=None):
    """A prediction that is `value` everywhere, and notes in `order` that it was asked."""

    def predict(latents, timestep):
        if order is not None:
            order.append(value)
        return torch.full((1, 4, 2, 2), value)

    return predict


def test_guidance_is_the_weighted_difference_of_both_halves():
    order = []
    out = guided(half(3.0, order), half(1.0, order), **HOW, applies=always)(torch.zeros(1), torch.zeros(()))
    assert torch.equal(out, torch.full((1, 4, 2, 2), 11.0)) and sorted(order) == [1.0, 3.0]


def test_where_guidance_does_not_apply_one_half_runs():
    order = []
    out = guided(half(3.0, order), half(1.0, order), **HOW, applies=never)(torch.zeros(1), torch.zeros(()))
    assert torch.equal(out, torch.full((1, 4, 2, 2), 3.0)) and order == [3.0]
    alone = guided_together(half(3.0, order), None, **HOW, applies=never)(torch.zeros(1), torch.zeros(()))
    assert torch.equal(alone, out)


def test_both_halves_in_one_batch_are_the_same():
    def both(latents, timestep):
        return torch.stack([torch.full((4, 2, 2), 1.0), torch.full((4, 2, 2), 3.0)])

    out = guided_together(half(3.0), both, **HOW, applies=always)(torch.zeros(1, 4, 2, 2), torch.zeros(()))
    assert torch.equal(out, torch.full((1, 4, 2, 2), 11.0))


def test_an_interval_of_noise_levels_is_open_below_and_closed_above():
    schedule = make_schedule("euler", scheduler_config(), 8, zero_noise)
    low, high = schedule.sigmas[5], schedule.sigmas[2]
    applies = where_guided(schedule, 7.5, (low, high))
    assert [applies(timestep) for timestep in schedule.timesteps] == [False] * 2 + [True] * 3 + [False] * 3
    assert all(map(where_guided(schedule, 7.5, ()), schedule.timesteps))
    assert not any(map(where_guided(schedule, 1.0, ()), schedule.timesteps))


def test_an_interval_may_have_no_upper_end():
    schedule = make_schedule("euler", scheduler_config(), 8, zero_noise)
    applies = where_guided(schedule, 7.5, (schedule.sigmas[5], float("inf")))
    assert [applies(timestep) for timestep in schedule.timesteps] == [True] * 5 + [False] * 3


def test_rescaling_equals_diffusers():
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    mixed, conditional = torch.randn(2, 1, 4, 8, 8)
    torch.testing.assert_close(rescaled(mixed, conditional, 0.7), rescale_noise_cfg(mixed, conditional, 0.7))
