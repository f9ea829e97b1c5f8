"""Stages `distill` and `tune`: linear attention learns to do what the UNet's self-attention does, then large pictures.

The first with LinFusion's loss (arXiv 2409.02097). It ends a few percent behind its teacher, the more the larger the
picture; the second goes on from there with the noise alone, mostly on pictures two and four times larger.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.training.distillation import build_student_modules, compute_distillation_loss, compute_noise_loss
from tools.demo_model.store import WORK, TrainingState, finished, load_tensors, log, save_tensors
from tools.demo_model.train import parallel
from tools.demo_model.train.latents import Latents, encoded
from tools.demo_model.train.unet import RESULT as UNET
from tools.demo_model.train.unet import Noised, conditioning, load_trained, signal_levels

NATIVE_TOKENS = 256
# linear attention is there for large pictures, so more of them than the UNet was trained on
KINDS = {"square": 0.35, "aspect": 0.1, "double": 0.35, "quadruple": 0.12, "detail": 0.08}
LARGE_KINDS = {"square": 0.2, "double": 0.6, "quadruple": 0.2}


class UnnormalisedAttention(LinearAttention):
    """The paper's ablation: q (Σ kᵀ v) without the denominator, so that what it gives grows with the picture.

    The constant stands for the tokens of the native size; projections could learn it.
    """

    def forward(self, hidden_states: Tensor, **_unused) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        q, (k, v) = self.queries(hidden_states), self.keys_values(hidden_states)
        return self.project_out(q @ (k.mT @ v) / (NATIVE_TOKENS * q.shape[-1]))


@dataclass(frozen=True)
class Stage:
    """What learns, on what; from the result of which stage it starts, or from the original projections."""

    form: type[LinearAttention]
    kinds: dict[str, float]
    learning_rate: float
    start: str | None = None

    @property
    def imitates(self) -> bool:
        """Whether its loss is the paper's; what goes on from a distilled form has no teacher."""
        return self.start is None


STAGES = {
    "distill_linear": Stage(LinearAttention, KINDS, 6e-4),
    "tune_linear": Stage(LinearAttention, LARGE_KINDS, 8e-4, start="distill_linear"),
    "distill_unnormalised": Stage(UnnormalisedAttention, KINDS, 6e-4),
}


def result_of(stage: str) -> Path:
    """Where the weights that a stage ended with lie."""
    return WORK / f"{stage}_done.safetensors"


def load_linear(unet: UNet2DConditionModel, stage: str = "tune_linear") -> dict[str, LinearAttention]:
    """The modules that a stage ended with."""
    modules = build_student_modules(unet, STAGES[stage].form)
    nn.ModuleList(modules.values()).load_state_dict(load_tensors(result_of(stage)))
    return modules


def train_linear(tokenizer: CLIPTokenizer, minutes: float, processes: int, stage: str) -> None:
    """Train the linear modules alone for `minutes`, anew where what they start from has changed."""
    result = result_of(stage)
    origin = result_of(STAGES[stage].start) if STAGES[stage].start else UNET
    for path in (result, WORK / f"{stage}.safetensors"):
        if path.exists() and path.stat().st_mtime < origin.stat().st_mtime:
            path.unlink()
    if not finished(stage, result, minutes):
        parallel.run(_train, processes, tokenizer, minutes, stage)


def _train(rank: int, tokenizer: CLIPTokenizer, minutes: float, name: str) -> None:
    torch.manual_seed(3)
    stage = STAGES[name]
    unet, text = load_trained(tokenizer)
    unet.to(memory_format=torch.channels_last)
    linear = load_linear(unet, stage.start) if stage.start else build_student_modules(unet, stage.form)
    student = nn.ModuleList(linear.values())
    optimizer = torch.optim.AdamW(student.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    state = TrainingState(name, {"linear": student}, optimizer, decay=0.998)
    torch.manual_seed(1000 * state.step + rank)
    data, levels = Latents(encoded(tokenizer), 1000 + state.step, rank), signal_levels()
    recent: list[Tensor] = []
    for progress in state.ticks(minutes, parallel.mean_over_ranks, rank == 0):
        rate = min(1.0, (state.step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = stage.learning_rate * rate
        batch = data.next(stage.kinds)
        with torch.no_grad():
            told = conditioning(text, batch, drop=0.2)
        noised = Noised(batch, levels)
        sample = noised.sample.contiguous(memory_format=torch.channels_last)
        recent.append(_learn(unet, linear, (sample, noised.times, noised.noise), told, stage.imitates))
        parallel.average_gradients(student.parameters())
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state.follow()
        if rank == 0 and state.step % 50 == 0:
            parts = " ".join(f"{part:.5f}" for part in torch.stack(recent).mean(dim=0).tolist())
            log.info("%s: step %d, parts of the loss %s", name, state.step, parts)
            recent.clear()
    if rank == 0:
        save_tensors(result_of(name), state.averaged("linear"))


def _learn(
    unet: nn.Module, linear: dict[str, LinearAttention], noised: tuple[Tensor, ...], told: dict, imitates: bool
) -> Tensor:
    """Leave the gradients of one batch; the loss in its parts, [3] (noise, teacher, layers) or [1]."""
    if imitates:
        loss = compute_distillation_loss(unet, linear, *noised, **told)
        loss.total.backward()
        return torch.stack([loss.noise, loss.teacher, loss.layers]).detach()
    loss = compute_noise_loss(unet, linear, *noised, **told)
    loss.backward()
    return loss.detach()[None]
