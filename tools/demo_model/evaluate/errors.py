"""Errors of the predicted noise on held-out scenes, by form of self-attention."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from linfusion_cli.mixers.linear.mount import find_self_attentions, mount_modules
from tools.demo_model.train.vae import to_input

Modules = Mapping[str, nn.Module]


class ZeroAttention(nn.Module):
    """Self-attention that returns zeros."""

    def forward(self, hidden_states: Tensor, **_unused) -> Tensor:
        """Return zeros [B, N, C]."""
        return torch.zeros_like(hidden_states)


def build_zero_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """Build the modules that disable all self-attention when mounted."""
    return {path: ZeroAttention() for path in find_self_attentions(unet)}


@torch.no_grad()
def measure_noise_errors(
    pipe: StableDiffusionXLPipeline,
    images: np.ndarray,
    captions: Sequence[str],
    forms: Mapping[str, Modules | None],
    draws: int,
) -> dict[str, float]:
    """Return the mean squared error of the predicted noise for each form of attention (None: the UNet's own).

    Each of `images` [n, H, W, 3] uint8 gets `draws` timesteps spread over the schedule; all forms get the same noise.
    """
    torch.manual_seed(5)
    totals = dict.fromkeys(forms, 0.0)
    for image, words in zip(images, captions, strict=True):
        for noise, inputs in add_noise(pipe, image, words, draws):
            for form, modules in forms.items():
                totals[form] += (predict_noise(pipe.unet, modules, inputs) - noise).square().mean().item()
    return {form: total / (len(images) * draws) for form, total in totals.items()}


def add_noise(
    pipe: StableDiffusionXLPipeline, image: np.ndarray, words: str, draws: int
) -> Iterator[tuple[Tensor, dict[str, object]]]:
    """Yield (noise, UNet inputs) for an image [H, W, 3] at `draws` timesteps spread over the schedule."""
    conditioning, latents = _build_conditioning(pipe, words, image.shape[:2]), encode(pipe, image)
    times = ((torch.arange(draws) + torch.rand(draws)) / draws * len(pipe.scheduler.alphas_cumprod)).long()
    for time in times:
        noise = torch.randn_like(latents)
        level = pipe.scheduler.alphas_cumprod[time]
        yield noise, {"sample": level.sqrt() * latents + (1 - level).sqrt() * noise, "timestep": time, **conditioning}


def predict_noise(unet: nn.Module, modules: Modules | None, inputs: dict[str, object]) -> Tensor:
    """Predict the noise with these modules mounted or, for None, with the UNet's own attention."""
    with mount_modules(unet, modules) if modules else nullcontext():
        return unet(**inputs).sample


def compute_closed_share(errors: Mapping[str, float]) -> float:
    """Return the share of the gap between no self-attention and softmax that linear attention closes."""
    return (errors["zero"] - errors["linear"]) / (errors["zero"] - errors["softmax"])


def encode(pipe: StableDiffusionXLPipeline, image: np.ndarray) -> Tensor:
    """Encode an image [H, W, 3] uint8 to latents [1, 4, h, w] with unit standard deviation."""
    return pipe.vae.encode(to_input(image[None])).latent_dist.mean * pipe.vae.config.scaling_factor


def _build_conditioning(pipe: StableDiffusionXLPipeline, words: str, shape: tuple[int, int]) -> dict[str, object]:
    """Build the conditioning with `shape` as original and target size, without crop."""
    context, _, pooled, _ = pipe.encode_prompt(words, do_classifier_free_guidance=False)
    ids = torch.tensor([[*shape, 0, 0, *shape]], dtype=torch.float32)
    return {
        "encoder_hidden_states": context,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids},
    }
