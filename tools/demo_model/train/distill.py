"""Stages `distill` and `tune`: distil the UNet's self-attention into linear attention, then tune on large images.

`distill` uses LinFusion's loss (arXiv 2409.02097). Its result is a few percent worse than the teacher, more for larger
images. `tune` continues with the noise loss alone, mostly on images two and four times larger.
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
from tools.demo_model.store import WORK, TrainingState, is_finished, load_tensors, log, save_tensors
from tools.demo_model.train import parallel
from tools.demo_model.train.latents import Latents, load_groups
from tools.demo_model.train.unet import RESULT as UNET
from tools.demo_model.train.unet import NoisyBatch, build_conditioning, compute_signal_levels, load_trained_models

NATIVE_TOKENS = 256
# more large images than in the UNet's training: linear attention is meant for them
KINDS = {"square": 0.35, "aspect": 0.1, "double": 0.35, "quadruple": 0.12, "detail": 0.08}
LARGE_KINDS = {"square": 0.2, "double": 0.6, "quadruple": 0.2}


class UnnormalisedAttention(LinearAttention):
    """The paper's ablation: q (Σ kᵀ v) without the denominator; the output grows with the image size.

    The constant factor is the number of tokens at the native size; the projections could also learn it.
    """

    def forward(self, hidden_states: Tensor, **_unused) -> Tensor:
        """Apply attention to [B, N, C]."""
        q, (k, v) = self.queries(hidden_states), self.keys_values(hidden_states)
        return self.project_out(q @ (k.mT @ v) / (NATIVE_TOKENS * q.shape[-1]))


@dataclass(frozen=True)
class Stage:
    """One training of linear attention; it starts from the result of stage `start` or the original projections."""

    form: type[LinearAttention]
    kinds: dict[str, float]
    learning_rate: float
    start: str | None = None

    @property
    def has_teacher(self) -> bool:
        """Whether the stage uses the paper's distillation loss; tuning has no teacher."""
        return self.start is None


STAGES = {
    "distill_linear": Stage(LinearAttention, KINDS, 6e-4),
    "tune_linear": Stage(LinearAttention, LARGE_KINDS, 8e-4, start="distill_linear"),
    "distill_unnormalised": Stage(UnnormalisedAttention, KINDS, 6e-4),
}


def get_result_path(stage: str) -> Path:
    """Return the path of the final weights of a stage."""
    return WORK / f"{stage}_done.safetensors"


def load_linear(unet: UNet2DConditionModel, stage: str = "tune_linear") -> dict[str, LinearAttention]:
    """Load the final modules of a stage."""
    modules = build_student_modules(unet, STAGES[stage].form)
    nn.ModuleList(modules.values()).load_state_dict(load_tensors(get_result_path(stage)))
    return modules


def train_linear(tokenizer: CLIPTokenizer, minutes: float, processes: int, stage: str) -> None:
    """Train the linear modules for `minutes`; restart if the stage that they start from has a newer result."""
    result = get_result_path(stage)
    origin = get_result_path(STAGES[stage].start) if STAGES[stage].start else UNET
    for path in (result, WORK / f"{stage}.safetensors"):
        if path.exists() and path.stat().st_mtime < origin.stat().st_mtime:
            path.unlink()
    if not is_finished(stage, result, minutes):
        parallel.run(_train, processes, tokenizer, minutes, stage)


def _train(rank: int, tokenizer: CLIPTokenizer, minutes: float, name: str) -> None:
    torch.manual_seed(3)
    stage = STAGES[name]
    unet, text = load_trained_models(tokenizer)
    unet.to(memory_format=torch.channels_last)
    linear = load_linear(unet, stage.start) if stage.start else build_student_modules(unet, stage.form)
    student = nn.ModuleList(linear.values())
    optimizer = torch.optim.AdamW(student.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    state = TrainingState(name, {"linear": student}, optimizer, decay=0.998)
    torch.manual_seed(1000 * state.step + rank)
    data, levels = Latents(load_groups(tokenizer), 1000 + state.step, rank), compute_signal_levels()
    recent: list[Tensor] = []
    for progress in state.iterate_progress(minutes, parallel.mean_over_ranks, rank == 0):
        rate = min(1.0, (state.step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = stage.learning_rate * rate
        batch = data.next(stage.kinds)
        with torch.no_grad():
            conditioning = build_conditioning(text, batch, drop=0.2)
        noised = NoisyBatch(batch, levels)
        sample = noised.sample.contiguous(memory_format=torch.channels_last)
        recent.append(_learn(unet, linear, (sample, noised.times, noised.noise), conditioning, stage.has_teacher))
        parallel.average_gradients(student.parameters())
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state.update_average()
        if rank == 0 and state.step % 50 == 0:
            parts = " ".join(f"{part:.5f}" for part in torch.stack(recent).mean(dim=0).tolist())
            log.info("%s: step %d, loss terms %s", name, state.step, parts)
            recent.clear()
    if rank == 0:
        save_tensors(get_result_path(name), state.select_average("linear"))


def _learn(
    unet: nn.Module,
    linear: dict[str, LinearAttention],
    noised: tuple[Tensor, ...],
    conditioning: dict,
    has_teacher: bool,
) -> Tensor:
    """Compute the gradients of one batch; return the loss terms, [3] (noise, teacher, layers) or [1]."""
    if has_teacher:
        loss = compute_distillation_loss(unet, linear, *noised, **conditioning)
        loss.total.backward()
        return torch.stack([loss.noise, loss.teacher, loss.layers]).detach()
    loss = compute_noise_loss(unet, linear, *noised, **conditioning)
    loss.backward()
    return loss.detach()[None]
