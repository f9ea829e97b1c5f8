"""What a network predicts, found by asking it: epsilon- and v-prediction have the same shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion_cli.core.errors import NonFinite
from linfusion_cli.sampling.guidance import Predict

ENOUGH = 0.5  # where neither is trained at all the correlation is 0; an epsilon model has 0.9 and more


def noise_correlation(predict: Predict, noise: Tensor, training_steps: int) -> float:
    """The correlation, -1 to 1, of pure `noise` [1, C, h, w] with what is predicted for it at the last timestep.

    Hardly any signal is left there. A network that predicts ε repeats its input; one that predicts v = α ε - σ x_0
    (Salimans and Ho, arXiv 2202.00512, appendix D), with α near 0, tells what it guesses of the picture.
    Raises NonFinite.
    """
    found = predict(noise, torch.tensor(training_steps - 1, device=noise.device))
    if not found.isfinite().all():
        raise NonFinite("The model predicts NaN or Inf for pure noise.")
    return F.cosine_similarity(found.flatten().double(), noise.flatten().double(), dim=0).item()


def prediction_type(correlation: float) -> str:
    """`epsilon` or `v_prediction`, by that correlation."""
    return "epsilon" if correlation > ENOUGH else "v_prediction"
