"""Stage `distill`: linear attention learns to do what the UNet's self-attention does (LinFusion, arXiv 2409.02097)."""

import math
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from linfusion_cli.attention.linear import LinearAttention
from linfusion_cli.training.distillation import distillation_loss, start_from_originals
from tools.demo_model import parallel
from tools.demo_model.latents import Latents
from tools.demo_model.store import WORK, TrainingState, finished, load_tensors, log, save_tensors
from tools.demo_model.unet import RESULT as UNET
from tools.demo_model.unet import Noised, conditioning, load_trained, signal_levels

LEARNING_RATE = 6e-4
NATIVE_TOKENS = 256
# linear attention is there for large pictures, so more of them than the UNet was trained on
KINDS = {"square": 0.55, "aspect": 0.15, "double": 0.2, "detail": 0.1}


class UnnormalisedAttention(LinearAttention):
    """The paper's ablation: q (Σ kᵀ v) without the denominator, so that what it gives grows with the picture.

    The constant stands for the tokens of the native size; projections could learn it.
    """

    def forward(self, hidden_states: Tensor, **_unused) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        q, (k, v) = self.queries(hidden_states), self.keys_values(hidden_states)
        return self.project_out(q @ (k.mT @ v) / (NATIVE_TOKENS * q.shape[-1]))


FORMS = {"linear": LinearAttention, "unnormalised": UnnormalisedAttention}


def result_of(form: str) -> Path:
    """Where the distilled weights of a form lie."""
    return WORK / f"distill_{form}_done.safetensors"


def load_linear(unet: UNet2DConditionModel, form: str = "linear") -> dict[str, LinearAttention]:
    """The distilled modules."""
    modules = start_from_originals(unet, FORMS[form])
    nn.ModuleList(modules.values()).load_state_dict(load_tensors(result_of(form)))
    return modules


def train_linear(tokenizer: CLIPTokenizer, minutes: float, processes: int, form: str = "linear") -> None:
    """Train the linear modules alone for `minutes`, anew where the UNet has changed."""
    result = result_of(form)
    for path in (result, WORK / f"distill_{form}.safetensors"):
        if path.exists() and path.stat().st_mtime < UNET.stat().st_mtime:
            path.unlink()
    if not finished(f"distill_{form}", result, minutes):
        parallel.run(_train, processes, tokenizer, minutes, form)


def _train(rank: int, tokenizer: CLIPTokenizer, minutes: float, form: str) -> None:
    torch.manual_seed(3)
    unet, text = load_trained(tokenizer)
    unet.to(memory_format=torch.channels_last)
    linear = start_from_originals(unet, FORMS[form])
    student = nn.ModuleList(linear.values())
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    state = TrainingState(f"distill_{form}", {"linear": student}, optimizer, decay=0.995)
    torch.manual_seed(1000 * state.step + rank)
    data, levels = Latents(tokenizer, 1000 + state.step, rank), signal_levels()
    recent: list[Tensor] = []
    for progress in state.ticks(minutes, parallel.mean_over_ranks, rank == 0):
        rate = min(1.0, (state.step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        batch = data.next(KINDS)
        with torch.no_grad():
            told = conditioning(text, batch, drop=0.2)
        noised = Noised(batch, levels)
        sample = noised.sample.contiguous(memory_format=torch.channels_last)
        loss = distillation_loss(unet, linear, sample, noised.times, noised.noise, **told)
        optimizer.zero_grad()
        loss.total.backward()
        parallel.average_gradients(student.parameters())
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        state.follow()
        recent.append(torch.stack([loss.noise, loss.teacher, loss.layers]).detach())
        if rank == 0 and state.step % 50 == 0:
            noise, teacher, layers = torch.stack(recent).mean(dim=0).tolist()
            log.info("%s: step %d, noise %.4f, teacher %.5f, layers %.4f", form, state.step, noise, teacher, layers)
            recent.clear()
    if rank == 0:
        save_tensors(result_of(form), state.averaged("linear"))
