"""Distillation of LinFusion, arXiv 2409.02097: linear attention learns to do what self-attention does.

    L = |ε' - ε|² + 0.5 |ε' - ε_teacher|² + 0.5 Σ over layers |A_linear - A_softmax|²

The teacher is the same UNet with its own self-attention; only the modules in its place learn. Every |·|² is a mean
over all elements. Shape letters: B batch, C channels of the latents, H and W their sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import mounted, self_attentions

TEACHER_WEIGHT = 0.5
LAYERS_WEIGHT = 0.5


@dataclass(frozen=True)
class DistillationLoss:
    """The three parts, each a scalar: to the noise, to the teacher's prediction, summed over the replaced layers."""

    noise: Tensor
    teacher: Tensor
    layers: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.noise + TEACHER_WEIGHT * self.teacher + LAYERS_WEIGHT * self.layers


def distillation_loss(
    unet: nn.Module,
    modules: Mapping[str, nn.Module],
    sample: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    **conditioning: Any,
) -> DistillationLoss:
    """Of the modules that learn, by the paths they are to be mounted at, with the UNet as it is for a teacher.

    Noised latents [B, C, H, W], their timesteps [B], the noise in them [B, C, H, W]; `conditioning` goes to the UNet.
    """
    originals = {path: unet.get_submodule(path) for path in modules}
    with torch.no_grad(), _outputs(originals) as wanted:
        taught = unet(sample, timesteps, **conditioning).sample
    with mounted(unet, modules), _outputs(modules) as given:
        said = unet(sample, timesteps, **conditioning).sample
    layers = sum((given[path] - wanted[path]).square().mean() for path in wanted)
    return DistillationLoss((said - noise).square().mean(), (said - taught).square().mean(), layers)


def noise_loss(
    unet: nn.Module,
    modules: Mapping[str, nn.Module],
    sample: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    **conditioning: Any,
) -> Tensor:
    """Its first part alone, for modules that are to do better than their teacher where it was hardly trained."""
    with mounted(unet, modules):
        return (unet(sample, timesteps, **conditioning).sample - noise).square().mean()


@contextmanager
def _outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Fills a dict with what each of the modules gives within the context."""
    seen: dict[str, Tensor] = {}

    def keep(path: str):
        return lambda _module, _inputs, output: seen.__setitem__(path, output)

    handles = [module.register_forward_hook(keep(path)) for path, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def start_from_originals(unet: nn.Module, make: type[LinearAttention] = LinearAttention) -> dict[str, LinearAttention]:
    """Path -> a linear module for every self-attention, with its projections; f_q and f_k begin as zero."""
    modules = {}
    for path, original in self_attentions(unet).items():
        linear = make(original.to_q.in_features, original.heads)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            linear.get_submodule(name).load_state_dict(original.get_submodule(name).state_dict())
        for branch in (linear.to_q_, linear.to_k_):
            nn.init.zeros_(branch[-1].weight)
            nn.init.zeros_(branch[-1].bias)
        modules[path] = linear
    return modules
