"""Schedulers by name: results equal to diffusers, noise per step, and errors for unsupported requests."""

import math

import pytest
import torch

from linfusion_cli.core.errors import DataError, NonFinite, UsageError
from linfusion_cli.sampling.noise import SequentialNoise
from linfusion_cli.sampling.schedulers.schedule import SCHEDULER_SPECS, build_schedule, draw_zero_noise
from linfusion_cli.sampling.upscalers.sdedit import denoise, sdedit
from linfusion_cli.settings.request import SCHEDULERS
from tests.support.small_models import build_scheduler_config

CONFIG = build_scheduler_config()
MIDWAY = [name for name, spec in SCHEDULER_SPECS.items() if spec.can_start_midway]
NOISE_ADDING = ("euler-a", "lcm", "dpmpp-2m-sde")


def schedule(name="euler", steps=20, count=None, draw=draw_zero_noise, config=CONFIG, spacing="auto"):
    """Build a schedule with default arguments."""
    return build_schedule(name, config, steps, draw, count, spacing)


def test_every_scheduler_of_the_settings_exists():
    assert tuple(SCHEDULER_SPECS) == SCHEDULERS


@pytest.mark.parametrize("name", MIDWAY)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("count", [20, 7, 2, 1])
def test_with_a_perfect_model_every_scheduler_reproduces_the_image(name, prediction, count):
    """The model knows the image, so every scheduler must return it, at whichever step it starts."""
    encoded, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    built = schedule(name, count=count, config=CONFIG | {"prediction_type": prediction}, draw=lambda step: noise)

    def predict(scaled, timestep):
        sigma = torch.tensor(built.sigmas[len(outcomes)], dtype=torch.float64)
        signal, level = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()  # scaled latents have unit variance
        epsilon = (scaled - signal * encoded) / level
        return epsilon if prediction == "epsilon" else signal * epsilon - level * encoded

    outcomes = []
    for latents in sdedit(encoded, noise, built, predict):
        outcomes.append(latents)
    assert len(outcomes) == count
    tolerance = 0.05 if name in ("ddim", "lcm") else 1e-4  # their last step ends at the first timestep, with some noise
    torch.testing.assert_close(outcomes[-1], encoded, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", SCHEDULER_SPECS)
def test_the_latents_of_a_base_equal_those_of_diffusers(name):
    """Run all steps from noise, like a pipeline with one generator for the initial and the added noise."""
    predict = lambda scaled, timestep: 0.3 * scaled.tanh() + 0.001 * timestep  # noqa: E731
    draw = SequentialNoise(5, 4, 8, 8, torch.float32)
    built = schedule(name, steps=12, draw=draw)
    ours = list(denoise(built.scale_noise(draw()), built, predict))[-1]

    spec = SCHEDULER_SPECS[name]
    theirs = spec.scheduler_class.from_config(CONFIG, **spec.options)
    theirs.set_timesteps(12)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * theirs.init_noise_sigma
    options = {"generator": generator} if name in NOISE_ADDING else {}
    for timestep in theirs.timesteps:
        prediction = predict(theirs.scale_model_input(latents, timestep), timestep)
        latents = theirs.step(prediction, timestep, latents, **options).prev_sample
    torch.testing.assert_close(ours, latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NOISE_ADDING)
def test_the_noise_that_a_scheduler_adds_is_drawn_for_its_step(name):
    steps = []

    def draw(step):
        steps.append(step)
        return torch.full((1, 4, 8, 8), float(step))

    built = schedule(name, steps=6, count=3, draw=draw)
    list(denoise(torch.zeros(1, 4, 8, 8), built, lambda scaled, timestep: scaled))
    assert steps == ([0, 1] if name == "lcm" else [0, 1, 2])


def test_a_scheduler_that_cannot_start_in_the_middle_is_refused():
    assert len(schedule("pndm", steps=10)) == 11  # it repeats its first step
    with pytest.raises(UsageError, match="--scheduler pndm cannot start in the middle"):
        schedule("pndm", steps=10, count=3)


@pytest.mark.parametrize(("name", "steps"), [("lcm", 51), ("dpmpp-2m", 1000)])
def test_more_steps_than_a_scheduler_can_take_are_refused(name, steps):
    with pytest.raises(UsageError, match=f"--steps {steps} is too many for --scheduler {name}"):
        schedule(name, steps=steps)


@pytest.mark.parametrize("name", MIDWAY)
def test_sigmas_equal_the_noise_level_of_the_scheduler(name):
    built = schedule(name, count=5)
    encoded, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    level = built.add_noise(encoded, noise, 0).mean() / built.add_noise(noise, encoded, 0).mean()
    assert level == pytest.approx(built.sigmas[0], rel=2e-3)
    assert all(high > low for high, low in zip(built.sigmas, built.sigmas[1:], strict=False))


def test_the_timestep_spacing_can_be_set():
    assert schedule(steps=4, spacing="trailing").timesteps[0] == 999
    assert schedule(steps=4).timesteps[0] < 800  # the spacing of the config: leading
    assert math.isclose(float(schedule(steps=4, spacing="linspace").timesteps[-1]), 0)


def test_an_unknown_noise_schedule_is_refused():
    with pytest.raises(DataError, match="scheduler_config"):
        schedule(config=CONFIG | {"beta_schedule": "zigzag"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SCHEDULER_SPECS)
def test_a_prediction_with_nan_or_inf_never_reaches_the_scheduler(name, value):
    built = schedule(name, draw=lambda step: torch.ones(1, 4, 8, 8))
    latents = built.step(torch.ones(1, 4, 8, 8), 0, torch.ones(1, 4, 8, 8))
    before, bad = built.state_dict(), torch.ones(1, 4, 8, 8)
    bad[0, 3, 7, 7] = value
    with pytest.raises(NonFinite, match=f"at step 2 of {len(built)}"):
        built.step(bad, 1, latents)
    after = built.state_dict()
    assert before.keys() == after.keys() and all(str(before[key]) == str(after[key]) for key in before)
    assert built.step(torch.ones(1, 4, 8, 8), 1, latents).isfinite().all()
