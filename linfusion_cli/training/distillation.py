"""Distillation of LinFusion, arXiv 2409.02097, section 3.4: linear attention learns to do what self-attention does.

    L = |ε' - ε|² + 0.5 |ε' - ε_teacher|² + 0.5 Σ over layers |A_linear - A_softmax|²

The teacher is the same UNet with its own self-attention; only the modules in its place learn. Every |·|² is a mean
over all elements. Shape letters: B batch, C channels of the latents, H and W their sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linfusion_cli.attention.linear import LinearAttention
from linfusion_cli.attention.mount import mounted, self_attentions

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


class Distillation:
    """A UNet that teaches and the modules that learn, by the paths they are to be mounted at.

    Hooks on the modules collect their outputs until `close`.
    """

    def __init__(self, unet: nn.Module, modules: Mapping[str, nn.Module]):
        self.unet, self.modules = unet, modules
        originals = {path: unet.get_submodule(path) for path in modules}
        self._wanted, self._given = _Outputs(originals), _Outputs(modules)

    def loss(self, sample: Tensor, timesteps: Tensor, noise: Tensor, **conditioning: Any) -> DistillationLoss:
        """Of noised latents [B, C, H, W], their timesteps [B] and the noise in them [B, C, H, W]."""
        with torch.no_grad():
            taught = self.unet(sample, timesteps, **conditioning).sample
        wanted = self._wanted.take()
        with mounted(self.unet, self.modules):
            said = self.unet(sample, timesteps, **conditioning).sample
        given = self._given.take()
        layers = sum((given[path] - wanted[path]).square().mean() for path in wanted)
        return DistillationLoss((said - noise).square().mean(), (said - taught).square().mean(), layers)

    def close(self) -> None:
        """Take the hooks off."""
        self._wanted.close()
        self._given.close()


class _Outputs:
    """Collects what a set of modules give in one forward pass."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._seen: dict[str, Tensor] = {}
        self._handles = [module.register_forward_hook(self._keep(path)) for path, module in modules.items()]

    def _keep(self, path: str):
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self._seen[path] = output

        return hook

    def take(self) -> dict[str, Tensor]:
        seen, self._seen = self._seen, {}
        return seen

    def close(self) -> None:
        for handle in self._handles:
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
