import pytest
import torch

from linfusion_cli.errors import DataError
from linfusion_cli.sampling import phases, schedule
from linfusion_cli.sampling.denoise import denoise
from linfusion_cli.sampling.guidance import guided, rescaled
from tests.models_in_small import small_scheduler

CONFIG = dict(small_scheduler().config)


def test_strengths_of_a_16k_ladder():
    assert schedule.phase_strengths(0.32, 4) == pytest.approx([0.32, 0.24, 0.16, 0.08])
    assert schedule.phase_strengths(0.32, 0) == []


@pytest.mark.parametrize(
    ("strength", "steps", "count"),
    [(0.32, 50, 16), (0.24, 50, 12), (0.08, 50, 4), (0.08, 24, 2), (1, 30, 30), (0, 30, 0)],
)
def test_a_phase_runs_the_last_steps(strength, steps, count):
    assert schedule.steps_run(strength, steps) == count


def test_sdedit_starts_at_the_picture_noised_to_the_first_of_the_last_steps():
    scheduler = schedule.euler(CONFIG, 20)
    timesteps = schedule.last_steps(scheduler, 5)
    encoded, noise = torch.randn(2, 1, 4, 8, 8)
    start = phases.sdedit_start(scheduler, timesteps, encoded, noise)
    torch.testing.assert_close(start, encoded + scheduler.sigmas[15] * noise)


@pytest.mark.parametrize("count", [20, 5, 1])
def test_euler_with_a_perfect_model_arrives_at_the_picture(count):
    """With the true noise as prediction, Euler's straight line ends at the picture it started from."""
    scheduler = schedule.euler(CONFIG, 20)
    timesteps = schedule.last_steps(scheduler, count)
    encoded, noise = torch.randn(2, 1, 4, 8, 8)
    start = phases.sdedit_start(scheduler, timesteps, encoded, noise)
    steps = list(denoise(start, scheduler, timesteps, lambda latents, timestep: noise))
    assert len(steps) == count
    torch.testing.assert_close(steps[-1], encoded, atol=1e-5, rtol=1e-5)


def test_guidance_is_the_weighted_difference_of_both_halves():
    order = []

    def half(name, value):
        return lambda latents, timestep: order.append(name) or torch.full((1, 4, 2, 2), value)

    out = guided(half("with", 3.0), half("without", 1.0), 5.0)(torch.zeros(1), torch.zeros(()))
    assert torch.equal(out, torch.full((1, 4, 2, 2), 11.0)) and sorted(order) == ["with", "without"]


def test_without_guidance_one_half_runs():
    def never(latents, timestep):
        raise AssertionError

    conditional = lambda latents, timestep: latents  # noqa: E731
    assert guided(conditional, never, 1.0) is conditional


def test_rescaling_equals_diffusers():
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    mixed, conditional = torch.randn(2, 1, 4, 8, 8)
    torch.testing.assert_close(rescaled(mixed, conditional, 0.7), rescale_noise_cfg(mixed, conditional, 0.7))


def test_an_unknown_schedule_is_refused():
    with pytest.raises(DataError, match="scheduler_config"):
        schedule.euler(CONFIG | {"beta_schedule": "zigzag"}, 10)
