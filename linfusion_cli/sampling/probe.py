"""Detect the prediction type of a UNet from one prediction. Its weights do not show it: the shapes are equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion_cli.core.errors import NonFinite
from linfusion_cli.sampling.guidance import Predict

MIN_EPSILON_CORRELATION = 0.5  # 0.9 or more for epsilon models, 0 for an untrained one


def measure_noise_correlation(predict: Predict, noise: Tensor, training_steps: int) -> float:
    """Return the correlation, -1 to 1, of pure `noise` [1, C, h, w] with its prediction at the last timestep.

    The signal is negligible there (α ≈ 0). A network that predicts ε returns its input. A network that predicts
    v = α ε - σ x_0 (Salimans and Ho, arXiv 2202.00512, appendix D) returns its estimate of the image.
    Raise NonFinite if the prediction has NaN or Inf.
    """
    prediction = predict(noise, torch.tensor(training_steps - 1, device=noise.device))
    if not prediction.isfinite().all():
        raise NonFinite("The model predicts NaN or Inf for pure noise.")
    return F.cosine_similarity(prediction.flatten().double(), noise.flatten().double(), dim=0).item()


def classify_prediction(correlation: float) -> str:
    """Return "epsilon" or "v_prediction", given the noise correlation."""
    return "epsilon" if correlation > MIN_EPSILON_CORRELATION else "v_prediction"
