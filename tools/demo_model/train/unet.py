"""Stage `unet`: the noise predictor and the text encoders, trained together on the latents."""

import math

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from tools.demo_model.store import WORK, TrainingState, finished, load_tensors, log, save_tensors
from tools.demo_model.train import parallel
from tools.demo_model.train.latents import Batch, Latents, encoded
from tools.demo_model.train.text import WIDTH, TextEncoders

RESULT = WORK / "unet_done.safetensors"
MINUTES = 95.0  # the shipped one's, on two CPU cores
LEARNING_RATE = 1.2e-3
UNCONDITIONAL = 0.1
# lets the mean of a picture be noisy too: without it the model trusts the mean of pure noise, and nights turn grey
NOISE_OFFSET = 0.1
SNR_CAP = 5.0
# words, colours and composition are learned at half size first, four times cheaper (share of the budget, of batches)
COARSE_UNTIL = 0.22
COARSE_KINDS = {"half": 0.8, "square": 0.2}
KINDS = {"square": 0.74, "aspect": 0.1, "detail": 0.09, "double": 0.07}


def build_unet() -> UNet2DConditionModel:
    """SDXL's UNet in small: the same kinds of block, the same conditioning."""
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
    """SDXL's."""
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


def signal_levels() -> Tensor:
    """Cumulative alpha of each training timestep, [1000]."""
    return build_scheduler().alphas_cumprod


class Noised:
    """A batch with noise of random strength: what the UNet sees and what it should say."""

    def __init__(self, batch: Batch, levels: Tensor):
        latents = batch.latents
        count = len(latents)
        # one timestep from each of `count` equal parts: less noisy losses than independent draws
        self.times = ((torch.arange(count) + torch.rand(count)) / count * len(levels)).long()
        offset = torch.randn(count, latents.shape[1], 1, 1)
        self.noise = torch.randn_like(latents) + NOISE_OFFSET * offset
        level = levels[self.times].view(-1, 1, 1, 1)
        self.sample = level.sqrt() * latents + (1 - level).sqrt() * self.noise
        snr = level / (1 - level)
        self.weight = snr.clamp(max=SNR_CAP) / snr  # min-SNR, arXiv 2303.09556


def conditioning(text: TextEncoders, batch: Batch, drop: float) -> dict[str, object]:
    """The UNet's keyword arguments; a share `drop` is unconditional, which in SDXL is zeros for both embeddings."""
    context, pooled = text(batch.tokens)
    keep = (torch.rand(len(batch.tokens)) >= drop).float()
    added = {"text_embeds": pooled * keep[:, None], "time_ids": batch.time_ids}
    return {"encoder_hidden_states": context * keep[:, None, None], "added_cond_kwargs": added}


def train_unet(tokenizer: CLIPTokenizer, minutes: float, processes: int) -> None:
    """Train until `minutes` are spent in all."""
    if not finished("unet", RESULT, minutes):
        parallel.run(_train, processes, tokenizer, minutes)


def _train(rank: int, tokenizer: CLIPTokenizer, minutes: float) -> None:
    torch.manual_seed(2)
    unet = build_unet().to(memory_format=torch.channels_last)
    models = nn.ModuleDict({"unet": unet, "text": TextEncoders(tokenizer)})
    optimizer = torch.optim.AdamW(models.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    state = TrainingState("unet", dict(models.items()), optimizer, decay=0.999)
    torch.manual_seed(1000 * state.step + rank)
    data, levels, recent = Latents(encoded(tokenizer), state.step, rank), signal_levels(), []
    for progress in state.ticks(minutes, parallel.mean_over_ranks, rank == 0):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * _schedule(state.step, progress)
        recent.append(train_step(models, data.next(COARSE_KINDS if progress < COARSE_UNTIL else KINDS), levels))
        parallel.average_gradients(models.parameters())
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state.follow()
        if rank == 0 and state.step % 100 == 0:
            log.info("unet: step %d, %.0f s, loss %.4f", state.step, state.seconds, sum(recent) / len(recent))
            recent.clear()
    if rank == 0:
        save_tensors(RESULT, state.average)


def _schedule(step: int, progress: float) -> float:
    return min(1.0, (step + 1) / 150) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_step(models: nn.ModuleDict, batch: Batch, levels: Tensor) -> float:
    """Leave the gradients of one batch in `models` (`unet` and `text`), and tell its loss."""
    noised = Noised(batch, levels)
    told = conditioning(models["text"], batch, UNCONDITIONAL)
    sample = noised.sample.contiguous(memory_format=torch.channels_last)
    said = models["unet"](sample, noised.times, **told).sample
    loss = (noised.weight * (said - noised.noise).square()).mean()
    loss.backward()
    return loss.item()


def load_trained(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, TextEncoders]:
    """The averaged weights of the finished stage."""
    tensors = load_tensors(RESULT)
    models = {"unet": build_unet(), "text": TextEncoders(tokenizer)}
    for name, model in models.items():
        model.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
        model.eval().requires_grad_(False)
    return models["unet"], models["text"]
