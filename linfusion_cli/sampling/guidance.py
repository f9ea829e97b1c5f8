"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) and its rescaling (Lin et al., arXiv 2305.08891)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]  # (scaled latents [B, C, H, W], timestep []) -> prediction [B, C, H, W]


def guided(conditional: Predict, unconditional: Predict, scale: float, rescale: float = 0.0) -> Predict:
    """ε = ε_u + scale · (ε_c − ε_u); the halves run one after the other, so only one is in memory at a time."""
    if scale <= 1:
        return conditional

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return mixed(unconditional(latents, timestep), conditional(latents, timestep), scale, rescale)

    return predict


def guided_together(both: Predict, scale: float, rescale: float = 0.0) -> Predict:
    """As `guided`, with both halves, the unconditional first, in one batch of two: faster, at twice the memory."""

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        without, with_prompt = both(latents.expand(2, -1, -1, -1), timestep).chunk(2)
        return mixed(without, with_prompt, scale, rescale)

    return predict


def mixed(without: Tensor, with_prompt: Tensor, scale: float, rescale: float) -> Tensor:
    """The guided prediction, from both halves."""
    guided_prediction = without + scale * (with_prompt - without)
    return rescaled(guided_prediction, with_prompt, rescale) if rescale else guided_prediction


def rescaled(guided_prediction: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Give a `share` of the guided prediction the conditional one's deviation: arXiv 2305.08891, section 3.4."""
    dims = tuple(range(1, guided_prediction.ndim))
    matched = guided_prediction * (conditional.std(dims, keepdim=True) / guided_prediction.std(dims, keepdim=True))
    return share * matched + (1 - share) * guided_prediction
