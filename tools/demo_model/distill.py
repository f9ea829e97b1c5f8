"""Stage `distill`: linear attention learns to do what the UNet's self-attention does (LinFusion, arXiv 2409.02097)."""

import math

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from linfusion_cli.attention.linear import LinearAttention
from linfusion_cli.attention.mount import mounted, self_attentions
from tools.demo_model import parallel
from tools.demo_model.latents import Latents
from tools.demo_model.store import WORK, TrainingState, finished, load_tensors, log, save_tensors
from tools.demo_model.unet import RESULT as UNET
from tools.demo_model.unet import Noised, conditioning, load_trained, signal_levels

RESULT = WORK / "distill_done.safetensors"
LEARNING_RATE = 6e-4
# linear attention is there for large pictures, so more of them than the UNet was trained on
KINDS = {"square": 0.55, "aspect": 0.15, "double": 0.2, "detail": 0.1}


def start_linear(unet: UNet2DConditionModel) -> dict[str, LinearAttention]:
    """Linear modules with the projections of the originals; f_q and f_k begin as zero."""
    modules = {}
    for path, original in self_attentions(unet).items():
        linear = LinearAttention(original.to_q.in_features, original.heads)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            linear.get_submodule(name).load_state_dict(original.get_submodule(name).state_dict())
        for branch in (linear.to_q_, linear.to_k_):
            nn.init.zeros_(branch[-1].weight)
            nn.init.zeros_(branch[-1].bias)
        modules[path] = linear
    return modules


def load_linear(unet: UNet2DConditionModel) -> dict[str, LinearAttention]:
    """The distilled modules, or the starting ones where there are none yet."""
    modules = start_linear(unet)
    if RESULT.exists():
        nn.ModuleList(modules.values()).load_state_dict(load_tensors(RESULT))
    return modules


class Outputs:
    """Collects what a set of modules give in one forward pass."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.seen: dict[str, Tensor] = {}
        self.handles = [module.register_forward_hook(self._keep(path)) for path, module in modules.items()]

    def _keep(self, path: str):
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self.seen[path] = output

        return hook

    def take(self) -> dict[str, Tensor]:
        """What was collected since the last call."""
        seen, self.seen = self.seen, {}
        return seen


def train_linear(tokenizer: CLIPTokenizer, minutes: float, processes: int) -> None:
    """Train the linear modules alone for `minutes`, anew where the UNet has changed."""
    for path in (RESULT, WORK / "distill.safetensors"):
        if path.exists() and path.stat().st_mtime < UNET.stat().st_mtime:
            path.unlink()
    if not finished("distill", RESULT, minutes):
        parallel.run(_train, processes, tokenizer, minutes)


def _train(rank: int, tokenizer: CLIPTokenizer, minutes: float) -> None:
    torch.manual_seed(3)
    unet, text = load_trained(tokenizer)
    unet.to(memory_format=torch.channels_last)
    linear = start_linear(unet)
    student = nn.ModuleList(linear.values())
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    state = TrainingState("distill", {"linear": student}, optimizer, decay=0.995)
    torch.manual_seed(1000 * state.step + rank)
    data, levels = Latents(tokenizer, 1000 + state.step, rank), signal_levels()
    hooks = Outputs(self_attentions(unet)), Outputs(linear)
    recent: list[Tensor] = []
    for progress in state.ticks(minutes, parallel.mean_over_ranks, rank == 0):
        rate = min(1.0, (state.step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        batch = data.next(KINDS)
        with torch.no_grad():
            told = conditioning(text, batch, drop=0.2)
        parts = _losses(unet, linear, hooks, Noised(batch, levels), told)
        optimizer.zero_grad()
        (parts[0] + 0.5 * parts[1] + 0.5 * parts[2]).backward()
        parallel.average_gradients(student.parameters())
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        state.follow()
        recent.append(parts.detach())
        if rank == 0 and state.step % 50 == 0:
            noise, teacher, layers = torch.stack(recent).mean(dim=0).tolist()
            log.info("distill: step %d, noise %.4f, teacher %.5f, layers %.4f", state.step, noise, teacher, layers)
            recent.clear()
    if rank == 0:
        save_tensors(RESULT, state.averaged("linear"))


def _losses(
    unet: UNet2DConditionModel,
    linear: dict[str, LinearAttention],
    hooks: tuple[Outputs, Outputs],
    noised: Noised,
    told: dict[str, object],
) -> Tensor:
    """[3]: to the noise, to the original's prediction, and summed over layers to the original attention's output."""
    sample = noised.sample.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        taught = unet(sample, noised.times, **told).sample
    wanted = hooks[0].take()
    with mounted(unet, linear):
        said = unet(sample, noised.times, **told).sample
    given = hooks[1].take()
    layers = sum((given[path] - wanted[path]).square().mean() for path in wanted)
    return torch.stack([(said - noised.noise).square().mean(), (said - taught).square().mean(), layers])
