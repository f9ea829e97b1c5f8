import math

import pytest
import torch

from linfusion_cli.core.errors import DataError, NonFinite, UsageError
from linfusion_cli.sampling.noise import SequentialNoise
from linfusion_cli.sampling.schedulers.schedule import SOLVERS, make_schedule, zero_noise
from linfusion_cli.sampling.upscalers.sdedit import denoise, sdedit
from linfusion_cli.settings.request import SCHEDULERS
from tests.support.small_models import scheduler_config

CONFIG = scheduler_config()
ANYWHERE = [name for name, solver in SOLVERS.items() if solver.anywhere]
ADDING = ("euler-a", "lcm", "dpmpp-2m-sde")


def schedule(name="euler", steps=20, count=None, draw=zero_noise, config=CONFIG, spacing="auto"):
    return make_schedule(name, config, steps, draw, count, spacing)


def test_every_scheduler_that_can_be_asked_for_is_there():
    assert tuple(SOLVERS) == SCHEDULERS


@pytest.mark.parametrize("name", ANYWHERE)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("count", [20, 7, 2, 1])
def test_with_a_perfect_model_every_scheduler_arrives_at_the_image(name, prediction, count):
    """The model that knows the picture: whatever a scheduler does in between, it must end there, wherever it starts."""
    encoded, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    found = schedule(name, count=count, config=CONFIG | {"prediction_type": prediction}, draw=lambda step: noise)

    def predict(scaled, timestep):
        sigma = torch.tensor(found.sigmas[len(outcomes)], dtype=torch.float64)
        signal, level = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()  # scaled latents have unit variance
        said = (scaled - signal * encoded) / level
        return said if prediction == "epsilon" else signal * said - level * encoded

    outcomes = []
    for latents in sdedit(encoded, noise, found, predict):
        outcomes.append(latents)
    assert len(outcomes) == count
    left = 0.05 if name in ("ddim", "lcm") else 1e-4  # their last step ends at the first timestep, not at no noise
    torch.testing.assert_close(outcomes[-1], encoded, atol=left, rtol=left)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_base_is_what_diffusers_makes_with_the_same_scheduler(name):
    """All steps from noise, as a pipeline runs them with one generator for the first noise and what is added."""
    predict = lambda scaled, timestep: 0.3 * scaled.tanh() + 0.001 * timestep  # noqa: E731
    draw = SequentialNoise(5, 4, 8, 8, torch.float32)
    found = schedule(name, steps=12, draw=draw)
    ours = list(denoise(found.scale_noise(draw()), found, predict))[-1]

    solver = SOLVERS[name]
    theirs = solver.kind.from_config(CONFIG, **solver.options)
    theirs.set_timesteps(12)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * theirs.init_noise_sigma
    more = {"generator": generator} if name in ADDING else {}
    for timestep in theirs.timesteps:
        said = predict(theirs.scale_model_input(latents, timestep), timestep)
        latents = theirs.step(said, timestep, latents, **more).prev_sample
    torch.testing.assert_close(ours, latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ADDING)
def test_noise_that_is_added_is_the_one_supplied_for_the_step(name):
    asked = []

    def draw(step):
        asked.append(step)
        return torch.full((1, 4, 8, 8), float(step))

    found = schedule(name, steps=6, count=3, draw=draw)
    list(denoise(torch.zeros(1, 4, 8, 8), found, lambda scaled, timestep: scaled))
    assert asked == ([0, 1] if name == "lcm" else [0, 1, 2])


def test_a_scheduler_that_cannot_start_in_the_middle_is_refused_by_name():
    assert len(schedule("pndm", steps=10)) == 11  # its first step is taken twice
    with pytest.raises(UsageError, match="--scheduler pndm cannot start in the middle"):
        schedule("pndm", steps=10, count=3)


@pytest.mark.parametrize(("name", "steps"), [("lcm", 51), ("dpmpp-2m", 1000)])
def test_more_steps_than_a_scheduler_can_take_are_refused(name, steps):
    with pytest.raises(UsageError, match=f"--steps {steps} is too many for --scheduler {name}"):
        schedule(name, steps=steps)


@pytest.mark.parametrize("name", ANYWHERE)
def test_noise_levels_are_those_that_the_scheduler_adds(name):
    found = schedule(name, count=5)
    encoded, noise = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    level = found.add_noise(encoded, noise, 0).mean() / found.add_noise(noise, encoded, 0).mean()
    assert level == pytest.approx(found.sigmas[0], rel=2e-3)
    assert all(high > low for high, low in zip(found.sigmas, found.sigmas[1:], strict=False))


def test_timesteps_are_spread_as_asked():
    assert schedule(steps=4, spacing="trailing").timesteps[0] == 999
    assert schedule(steps=4).timesteps[0] < 800  # the model's own: leading
    assert math.isclose(float(schedule(steps=4, spacing="linspace").timesteps[-1]), 0)


def test_an_unknown_noise_schedule_is_refused():
    with pytest.raises(DataError, match="scheduler_config"):
        schedule(config=CONFIG | {"beta_schedule": "zigzag"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_prediction_with_nan_or_inf_never_reaches_the_scheduler(name, value):
    found = schedule(name, draw=lambda step: torch.ones(1, 4, 8, 8))
    latents = found.step(torch.ones(1, 4, 8, 8), 0, torch.ones(1, 4, 8, 8))
    before, bad = found.state(), torch.ones(1, 4, 8, 8)
    bad[0, 3, 7, 7] = value
    with pytest.raises(NonFinite, match=f"at step 2 of {len(found)}"):
        found.step(bad, 1, latents)
    after = found.state()
    assert before.keys() == after.keys() and all(str(before[key]) == str(after[key]) for key in before)
    assert found.step(torch.ones(1, 4, 8, 8), 1, latents).isfinite().all()
