"""The prediction type is detected from one prediction for pure noise."""

import math

import pytest
import torch

from linfusion_cli.core.errors import NonFinite
from linfusion_cli.sampling.noise import draw_phase_noise
from linfusion_cli.sampling.probe import classify_prediction, measure_noise_correlation

LAST_ALPHA = 0.068  # square root of the last alphas_cumprod in SDXL's schedule
NOISE = draw_phase_noise(0, 0, 4, 32, 32)


def predict_epsilon(guess):
    """Return an epsilon model with the image estimate `guess`: ε = (x - α x_0) / σ."""
    return lambda x, t: (x - LAST_ALPHA * guess) / math.sqrt(1 - LAST_ALPHA**2)


def predict_v(guess):
    """Return a v-prediction model with the same estimate: v = α ε - σ x_0."""
    return lambda x, t: LAST_ALPHA * predict_epsilon(guess)(x, t) - math.sqrt(1 - LAST_ALPHA**2) * guess


@pytest.mark.parametrize("strength", [0.3, 0.8, 2.0])
@pytest.mark.parametrize(("build", "expected"), [(predict_epsilon, "epsilon"), (predict_v, "v_prediction")])
def test_the_prediction_type_is_detected_at_the_last_timestep(build, expected, strength):
    """An estimate from pure noise is smooth: here, it is constant in each channel."""
    guess = strength * torch.tensor([1.0, -0.5, 0.3, -1.0])[None, :, None, None].expand_as(NOISE)
    assert classify_prediction(measure_noise_correlation(build(guess), NOISE, 1000)) == expected


def test_the_model_runs_once_at_the_last_timestep():
    timesteps = []
    measure_noise_correlation(lambda x, t: timesteps.append(t.item()) or x, NOISE, 1000)
    assert timesteps == [999]


def test_a_prediction_of_nan_is_an_error():
    with pytest.raises(NonFinite, match="NaN or Inf for pure noise"):
        measure_noise_correlation(lambda x, t: x * math.nan, NOISE, 1000)
