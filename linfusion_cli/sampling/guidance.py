"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) and its rescaling (Lin et al., arXiv 2305.08891)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from linfusion_cli.sampling.schedulers.schedule import Schedule

Predict = Callable[[Tensor, Tensor], Tensor]  # (scaled latents [B, C, H, W], timestep []) -> prediction [B, C, H, W]
Applies = Callable[[Tensor], bool]  # timestep [] -> whether guidance works there


def guided(conditional: Predict, unconditional: Predict, scale: float, rescale: float, applies: Applies) -> Predict:
    """ε = ε_u + scale · (ε_c − ε_u); the halves run one after the other, so only one is in memory at a time."""

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        if not applies(timestep):
            return conditional(latents, timestep)
        return mixed(unconditional(latents, timestep), conditional(latents, timestep), scale, rescale)

    return predict


def guided_together(conditional: Predict, both: Predict, scale: float, rescale: float, applies: Applies) -> Predict:
    """As `guided`, with both halves, the unconditional first, in one batch of two: faster, at twice the memory."""

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        if not applies(timestep):
            return conditional(latents, timestep)
        without, with_prompt = both(latents.expand(2, -1, -1, -1), timestep).chunk(2)
        return mixed(without, with_prompt, scale, rescale)

    return predict


def where_guided(schedule: Schedule, scale: float, interval: Sequence[float]) -> Applies:
    """Guidance at sigmas above the lower and up to the upper end of `interval`: Kynkäänniemi et al., arXiv 2404.07724.

    Everywhere without an interval; nowhere at a scale of 1 or less.
    """
    low, high = interval or (-1.0, float("inf"))
    steps = zip(schedule.timesteps.tolist(), schedule.sigmas, strict=True)
    timesteps = {timestep for timestep, sigma in steps if scale > 1 and low < sigma <= high}
    return lambda timestep: float(timestep) in timesteps


def mixed(without: Tensor, with_prompt: Tensor, scale: float, rescale: float) -> Tensor:
    """The guided prediction, from both halves."""
    guided_prediction = without + scale * (with_prompt - without)
    return rescaled(guided_prediction, with_prompt, rescale) if rescale else guided_prediction


def rescaled(guided_prediction: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Give a `share` of the guided prediction the conditional one's deviation: arXiv 2305.08891, section 3.4."""
    dims = tuple(range(1, guided_prediction.ndim))
    matched = guided_prediction * (conditional.std(dims, keepdim=True) / guided_prediction.std(dims, keepdim=True))
    return share * matched + (1 - share) * guided_prediction
