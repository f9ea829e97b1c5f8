"""Stage `unet`: train the UNet and the text encoders together on the latents."""

import math

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from tools.demo_model.store import WORK, TrainingState, is_finished, load_tensors, log, save_tensors
from tools.demo_model.train import parallel
from tools.demo_model.train.latents import Batch, Latents, load_groups
from tools.demo_model.train.text import WIDTH, TextEncoders

RESULT = WORK / "unet_done.safetensors"
MINUTES = 95.0  # training time of the shipped model, on two CPU cores
LEARNING_RATE = 1.2e-3
UNCONDITIONAL = 0.1
# also adds noise to the mean of an image: otherwise the model relies on the mean of the initial noise; nights turn grey
NOISE_OFFSET = 0.1
SNR_CAP = 5.0
# the first share of the budget trains mostly at half size, at a quarter of the cost, to learn captions and composition
COARSE_UNTIL = 0.22
COARSE_KINDS = {"half": 0.8, "square": 0.2}
KINDS = {"square": 0.74, "aspect": 0.1, "detail": 0.09, "double": 0.07}


def build_unet() -> UNet2DConditionModel:
    """Build a small UNet with SDXL's block types and conditioning."""
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[1, 2, 3],
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=WIDTH + 6 * 32,
        norm_num_groups=8,
    )


def build_scheduler() -> EulerDiscreteScheduler:
    """Build SDXL's scheduler."""
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type="epsilon",
        interpolation_type="linear",
        use_karras_sigmas=False,
    )


def compute_signal_levels() -> Tensor:
    """Return the cumulative alpha of each training timestep, [1000]."""
    return build_scheduler().alphas_cumprod


class NoisyBatch:
    """A batch with noise of random strength: the UNet's input and the noise to predict."""

    def __init__(self, batch: Batch, levels: Tensor):
        latents = batch.latents
        count = len(latents)
        # stratified timesteps: the loss has less variance than with independent ones
        self.times = ((torch.arange(count) + torch.rand(count)) / count * len(levels)).long()
        offset = torch.randn(count, latents.shape[1], 1, 1)
        self.noise = torch.randn_like(latents) + NOISE_OFFSET * offset
        level = levels[self.times].view(-1, 1, 1, 1)
        self.sample = level.sqrt() * latents + (1 - level).sqrt() * self.noise
        snr = level / (1 - level)
        self.weight = snr.clamp(max=SNR_CAP) / snr  # min-SNR, arXiv 2303.09556


def build_conditioning(text: TextEncoders, batch: Batch, drop: float) -> dict[str, object]:
    """Build the UNet's keyword arguments; a share `drop` is unconditional (both embeddings zero, as in SDXL)."""
    context, pooled = text(batch.tokens)
    keep = (torch.rand(len(batch.tokens)) >= drop).float()
    added = {"text_embeds": pooled * keep[:, None], "time_ids": batch.time_ids}
    return {"encoder_hidden_states": context * keep[:, None, None], "added_cond_kwargs": added}


def train_unet(tokenizer: CLIPTokenizer, minutes: float, processes: int) -> None:
    """Train for `minutes` in total; resume an interrupted training."""
    if not is_finished("unet", RESULT, minutes):
        parallel.run(_train, processes, tokenizer, minutes)


def _train(rank: int, tokenizer: CLIPTokenizer, minutes: float) -> None:
    torch.manual_seed(2)
    unet = build_unet().to(memory_format=torch.channels_last)
    models = nn.ModuleDict({"unet": unet, "text": TextEncoders(tokenizer)})
    optimizer = torch.optim.AdamW(models.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    state = TrainingState("unet", dict(models.items()), optimizer, decay=0.999)
    torch.manual_seed(1000 * state.step + rank)
    data, levels, recent = Latents(load_groups(tokenizer), state.step, rank), compute_signal_levels(), []
    for progress in state.iterate_progress(minutes, parallel.mean_over_ranks, rank == 0):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * _compute_rate_factor(state.step, progress)
        recent.append(train_step(models, data.next(COARSE_KINDS if progress < COARSE_UNTIL else KINDS), levels))
        parallel.average_gradients(models.parameters())
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state.update_average()
        if rank == 0 and state.step % 100 == 0:
            log.info("unet: step %d, %.0f s, loss %.4f", state.step, state.seconds, sum(recent) / len(recent))
            recent.clear()
    if rank == 0:
        save_tensors(RESULT, state.average)


def _compute_rate_factor(step: int, progress: float) -> float:
    return min(1.0, (step + 1) / 150) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_step(models: nn.ModuleDict, batch: Batch, levels: Tensor) -> float:
    """Compute the gradients of one batch in `models` (`unet` and `text`); return its loss."""
    noised = NoisyBatch(batch, levels)
    conditioning = build_conditioning(models["text"], batch, UNCONDITIONAL)
    sample = noised.sample.contiguous(memory_format=torch.channels_last)
    predicted = models["unet"](sample, noised.times, **conditioning).sample
    loss = (noised.weight * (predicted - noised.noise).square()).mean()
    loss.backward()
    return loss.item()


def load_trained_models(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, TextEncoders]:
    """Load the UNet and the text encoders with their averaged final weights."""
    tensors = load_tensors(RESULT)
    models = {"unet": build_unet(), "text": TextEncoders(tokenizer)}
    for name, model in models.items():
        model.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
        model.eval().requires_grad_(False)
    return models["unet"], models["text"]
