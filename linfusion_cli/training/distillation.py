"""Distillation loss of LinFusion, arXiv 2409.02097: linear attention learns to reproduce self-attention.

    L = |ε' - ε|² + 0.5 |ε' - ε_teacher|² + 0.5 Σ over layers |A_linear - A_softmax|²

The teacher is the same UNet with its own self-attention; only the replacements are trained. Each |·|² is a mean over
all elements. Shape letters: B batch, C channels of the latents, H and W their sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions, get_attention_shape, mount_modules

TEACHER_WEIGHT = 0.5
LAYERS_WEIGHT = 0.5


@dataclass(frozen=True)
class DistillationLoss:
    """The three terms, each a scalar: to the noise, to the teacher's prediction, and summed over the layers."""

    noise: Tensor
    teacher: Tensor
    layers: Tensor

    @property
    def total(self) -> Tensor:
        """The weighted sum, which is minimised."""
        return self.noise + TEACHER_WEIGHT * self.teacher + LAYERS_WEIGHT * self.layers


def compute_distillation_loss(
    unet: nn.Module,
    modules: Mapping[str, nn.Module],
    sample: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    **conditioning: Any,
) -> DistillationLoss:
    """Compute the loss of the student `modules` (UNet path -> module) with the original UNet as the teacher.

    `sample` are the noised latents [B, C, H, W], with their `timesteps` [B] and `noise` [B, C, H, W]; `conditioning` is
    passed to the UNet.
    """
    originals = {path: unet.get_submodule(path) for path in modules}
    with torch.no_grad(), _record_outputs(originals) as teacher_layers:
        teacher = unet(sample, timesteps, **conditioning).sample
    with mount_modules(unet, modules), _record_outputs(modules) as student_layers:
        student = unet(sample, timesteps, **conditioning).sample
    layers = sum((student_layers[path] - teacher_layers[path]).square().mean() for path in teacher_layers)
    noise_term, teacher_term = (student - noise).square().mean(), (student - teacher).square().mean()
    return DistillationLoss(noise_term, teacher_term, cast(Tensor, layers))


def compute_noise_loss(
    unet: nn.Module,
    modules: Mapping[str, nn.Module],
    sample: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    **conditioning: Any,
) -> Tensor:
    """Compute the noise term alone, for students that should surpass a teacher with little training."""
    with mount_modules(unet, modules):
        return (unet(sample, timesteps, **conditioning).sample - noise).square().mean()


@contextmanager
def _record_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the last output of each module in this block, as path -> output."""
    outputs: dict[str, Tensor] = {}

    def record(path: str):
        return lambda _module, _inputs, output: outputs.__setitem__(path, output)

    handles = [module.register_forward_hook(record(path)) for path, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def build_student_modules(
    unet: nn.Module, module_type: type[LinearAttention] = LinearAttention
) -> dict[str, LinearAttention]:
    """Build path -> linear module for every self-attention, with its projections, and f_q and f_k set to zero."""
    modules = {}
    for path, original in find_self_attentions(unet).items():
        linear = module_type(*get_attention_shape(original))
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            linear.get_submodule(name).load_state_dict(original.get_submodule(name).state_dict())
        for branch in (linear.to_q_, linear.to_k_):
            last = cast(nn.Linear, cast(nn.Sequential, branch)[-1])
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        modules[path] = linear
    return modules
