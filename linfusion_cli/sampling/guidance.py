"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) and its rescaling (Lin et al., arXiv 2305.08891)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from linfusion_cli.sampling.schedulers.schedule import Schedule

Predict = Callable[[Tensor, Tensor], Tensor]  # (scaled latents [B, C, H, W], timestep []) -> prediction [B, C, H, W]
GuidanceFilter = Callable[[Tensor], bool]  # timestep [] -> whether guidance is used


def guide(
    conditional: Predict, unconditional: Predict, scale: float, rescale: float, applies: GuidanceFilter
) -> Predict:
    """Return a guided prediction function, ε = ε_u + scale · (ε_c − ε_u).

    The two halves run one after the other, which halves the memory compared to `guide_batched`.
    """

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        if not applies(timestep):
            return conditional(latents, timestep)
        return combine_halves(unconditional(latents, timestep), conditional(latents, timestep), scale, rescale)

    return predict


def guide_batched(
    conditional: Predict, both: Predict, scale: float, rescale: float, applies: GuidanceFilter
) -> Predict:
    """Return a guided prediction function that runs both halves in a batch of two, the unconditional one first."""

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        if not applies(timestep):
            return conditional(latents, timestep)
        uncond, cond = both(latents.expand(2, -1, -1, -1), timestep).chunk(2)
        return combine_halves(uncond, cond, scale, rescale)

    return predict


def build_guidance_filter(schedule: Schedule, scale: float, interval: Sequence[float]) -> GuidanceFilter:
    """Return the filter of a guidance interval: lower < sigma <= upper (Kynkäänniemi et al., arXiv 2404.07724).

    Without an interval, guidance is used at all timesteps. With a scale of 1 or less, it is never used.
    """
    low, high = interval or (-1.0, float("inf"))
    steps = zip(schedule.timesteps.tolist(), schedule.sigmas, strict=True)
    timesteps = {timestep for timestep, sigma in steps if scale > 1 and low < sigma <= high}
    return lambda timestep: float(timestep) in timesteps


def combine_halves(uncond: Tensor, cond: Tensor, scale: float, rescale: float) -> Tensor:
    """Return the guided prediction, given the predictions without (`uncond`) and with (`cond`) the prompt."""
    guided = uncond + scale * (cond - uncond)
    return rescale_deviation(guided, cond, rescale) if rescale else guided


def rescale_deviation(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Rescale the standard deviation to that of the conditional prediction, weighted by `share`: section 3.4."""
    dims = tuple(range(1, guided.ndim))
    matched = guided * (conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return share * matched + (1 - share) * guided
