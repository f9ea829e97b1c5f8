"""How well the noise is predicted on held-out scenes, with softmax, linear, unnormalised and zeroed self-attention."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from linfusion_cli.mixers.linear.mount import find_self_attentions, mount_modules
from tools.demo_model.train.vae import as_input

Modules = Mapping[str, nn.Module]


class Zero(nn.Module):
    """Self-attention that says nothing."""

    def forward(self, hidden_states: Tensor, **_unused) -> Tensor:
        """[B, N, C] -> zeros [B, N, C]."""
        return torch.zeros_like(hidden_states)


def zeroed(unet: nn.Module) -> dict[str, nn.Module]:
    """The modules to mount for no self-attention at all."""
    return {path: Zero() for path in find_self_attentions(unet)}


@torch.no_grad()
def noise_errors(
    pipe: StableDiffusionXLPipeline,
    images: np.ndarray,
    captions: Sequence[str],
    forms: Mapping[str, Modules | None],
    draws: int,
) -> dict[str, float]:
    """Mean squared error of the predicted noise for each form of attention (None: the UNet's own).

    `pictures` [n, H, W, 3] uint8, each with `draws` timesteps spread over the schedule; all forms see the same noise.
    """
    torch.manual_seed(5)
    totals = dict.fromkeys(forms, 0.0)
    for image, words in zip(images, captions, strict=True):
        for noise, seen in add_noise(pipe, image, words, draws):
            for form, modules in forms.items():
                totals[form] += (predicted(pipe.unet, modules, seen) - noise).square().mean().item()
    return {form: total / (len(images) * draws) for form, total in totals.items()}


def add_noise(
    pipe: StableDiffusionXLPipeline, image: np.ndarray, words: str, draws: int
) -> Iterator[tuple[Tensor, dict[str, object]]]:
    """Noise on a picture [H, W, 3] at `draws` timesteps spread over the schedule, and what the UNet is then given."""
    told, latents = _conditioning(pipe, words, image.shape[:2]), encode(pipe, image)
    times = ((torch.arange(draws) + torch.rand(draws)) / draws * len(pipe.scheduler.alphas_cumprod)).long()
    for time in times:
        noise = torch.randn_like(latents)
        level = pipe.scheduler.alphas_cumprod[time]
        yield noise, {"sample": level.sqrt() * latents + (1 - level).sqrt() * noise, "timestep": time, **told}


def predicted(unet: nn.Module, modules: Modules | None, seen: dict[str, object]) -> Tensor:
    """The noise that the UNet sees with these modules mounted, or (None) with its own attention."""
    with mount_modules(unet, modules) if modules else nullcontext():
        return unet(**seen).sample


def closed(errors: Mapping[str, float]) -> float:
    """Share of the gap between no self-attention and softmax that linear attention closes."""
    return (errors["zero"] - errors["linear"]) / (errors["zero"] - errors["softmax"])


def encode(pipe: StableDiffusionXLPipeline, image: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 -> latents [1, 4, h, w], unit deviation."""
    return pipe.vae.encode(as_input(image[None])).latent_dist.mean * pipe.vae.config.scaling_factor


def _conditioning(pipe: StableDiffusionXLPipeline, words: str, shape: tuple[int, int]) -> dict[str, object]:
    """The size as original and target, no crop."""
    context, _, pooled, _ = pipe.encode_prompt(words, do_classifier_free_guidance=False)
    ids = torch.tensor([[*shape, 0, 0, *shape]], dtype=torch.float32)
    return {
        "encoder_hidden_states": context,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids},
    }
