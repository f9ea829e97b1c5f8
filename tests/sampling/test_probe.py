import math

import pytest
import torch

from linfusion_cli.core.errors import NonFinite
from linfusion_cli.sampling.noise import phase_noise
from linfusion_cli.sampling.probe import noise_correlation, prediction_type

LAST_ALPHA = 0.068  # of SDXL's schedule: sqrt of the last alphas_cumprod
NOISE = phase_noise(0, 0, 4, 32, 32)


def says_epsilon(guess):
    """What is predicted where the picture is guessed: ε = (x - α x_0) / σ."""
    return lambda x, t: (x - LAST_ALPHA * guess) / math.sqrt(1 - LAST_ALPHA**2)


def says_v(guess):
    """v = α ε - σ x_0, with the same guess."""
    return lambda x, t: LAST_ALPHA * says_epsilon(guess)(x, t) - math.sqrt(1 - LAST_ALPHA**2) * guess


@pytest.mark.parametrize("strength", [0.3, 0.8, 2.0])
@pytest.mark.parametrize(("says", "expected"), [(says_epsilon, "epsilon"), (says_v, "v_prediction")])
def test_what_is_predicted_shows_at_the_last_timestep(says, expected, strength):
    """A guess from noise alone is smooth: here one value a channel."""
    guess = strength * torch.tensor([1.0, -0.5, 0.3, -1.0])[None, :, None, None].expand_as(NOISE)
    assert prediction_type(noise_correlation(says(guess), NOISE, 1000)) == expected


def test_it_is_asked_once_and_at_the_last_timestep():
    asked = []
    noise_correlation(lambda x, t: asked.append(t.item()) or x, NOISE, 1000)
    assert asked == [999]


def test_a_model_that_answers_nan_is_not_taken_for_v_prediction():
    with pytest.raises(NonFinite, match="NaN or Inf for pure noise"):
        noise_correlation(lambda x, t: x * math.nan, NOISE, 1000)
