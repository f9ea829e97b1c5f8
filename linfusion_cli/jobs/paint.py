"""The stages of a run that make latents: each takes the Run and what the stage before made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from linfusion_cli.attention.linear import LinearAttention
from linfusion_cli.attention.mount import mounted, self_attentions
from linfusion_cli.attention.weights import load_weights
from linfusion_cli.device import limit_device_memory
from linfusion_cli.jobs.pixels import enlarge
from linfusion_cli.jobs.plan import plan_run
from linfusion_cli.jobs.prepare import Prepared
from linfusion_cli.jobs.record import Recorder
from linfusion_cli.jobs.run import Run, checked
from linfusion_cli.models.load import Vae, load_unet, load_vae
from linfusion_cli.models.text import Conditioning, encode_prompts
from linfusion_cli.planning.needs import Mode
from linfusion_cli.sampling import phases, schedule
from linfusion_cli.sampling.denoise import denoise
from linfusion_cli.sampling.guidance import Predict, guided, guided_together
from linfusion_cli.sampling.noise import base_noise, phase_noise
from linfusion_cli.strips.exchange import Alone
from linfusion_cli.strips.ops import Strips
from linfusion_cli.strips.storage import Storage
from linfusion_cli.unet.predict import InStrips, Whole

UNHEARD = "The prompt is too long for the model's text encoder, which did not hear its end: {!r}."
SMALLER = "Memory ran out: the step is repeated, and the phase goes on, in strips of {} rows and {} tokens, {}."
MAPS = {"device": "maps on the device", "skips": "skip connections on the host", "host": "maps on the host"}


@dataclass(frozen=True)
class Models:
    """The loaded models and what the UNet hears; `linear` is the attention that phases may mount in it."""

    unet: UNet2DConditionModel
    linear: dict[str, LinearAttention]
    vae: Vae
    conditioning: Conditioning


def begin(prepared: Prepared, recorder: Recorder) -> Run:
    """Settle how this run works; raises DoesNotFit where it cannot."""
    gc.freeze()  # what the imports made stays: collecting at each stage need not walk a million objects
    run = Run(prepared, plan_run(prepared), recorder)
    recorder.device = run.device
    limit_device_memory(run.device, prepared.request.vram)
    recorder.planned(run.plan.need, run.plan.need.device_bytes if run.device.type == "cuda" else None)
    return run


def read_prompts(run: Run) -> Conditioning:
    """Both prompts as the UNet hears them; the text encoders are freed when this returns."""
    request, prepared = run.prepared.request, run.prepared
    with run.recorder.stage("prompt", "text", None, 1, "prompts"):
        conditioning = encode_prompts(
            prepared.model, prepared.facts, request.prompt, request.negative_prompt, run.dtype, run.device
        )
    if conditioning.unheard:
        run.recorder.notice(UNHEARD.format(conditioning.unheard))
    return conditioning


def load(run: Run, conditioning: Conditioning) -> Models:
    """The VAE on the device; the UNet and its linear attention on the CPU, until a phase mounts what it needs."""
    prepared = run.prepared
    with run.recorder.stage("models", "load", None, 1, "models"):
        vae = load_vae(prepared.vae, run.plan.machine.vae_dtype, run.device)
        unet = load_unet(prepared.model, run.dtype)
        linear = load_weights(prepared.linfusion, unet, run.dtype) if prepared.linfusion else {}
    return Models(unet, linear, vae, conditioning)


def base(run: Run, models: Models) -> Tensor:
    """Latents [1, C, h, w] of the picture at the model's native size, from noise."""
    request, facts = run.prepared.request, run.prepared.facts
    size_lat = run.prepared.sizes[0].divided(facts.vae_factor)
    noise = base_noise(request.seed, facts.latent_channels, size_lat.height, size_lat.width, run.dtype)
    scheduler = schedule.euler(facts.scheduler_config, request.steps)
    return _denoise(run, models, 0, scheduler, scheduler.timesteps, phases.base_start(scheduler, noise))


def grow(run: Run, models: Models, latents: Tensor, phase: int) -> Tensor:
    """Latents of phase - 1 -> latents of `phase`: decoded, resized, encoded, noised and denoised again (SDEdit)."""
    request, facts, sizes = run.prepared.request, run.prepared.facts, run.prepared.sizes
    strength = schedule.phase_strengths(request.strength, len(sizes) - 1)[phase - 1]
    encoded = enlarge(run, models.vae, latents, phase)
    steps = schedule.steps_run(strength, request.steps)
    if steps == 0:
        return encoded
    scheduler = schedule.euler(facts.scheduler_config, request.steps)
    timesteps = schedule.last_steps(scheduler, steps)
    noise = phase_noise(request.seed, phase, *encoded.shape[1:])
    return _denoise(run, models, phase, scheduler, timesteps, phases.sdedit_start(scheduler, timesteps, encoded, noise))


def _denoise(run: Run, models: Models, phase: int, scheduler, timesteps: Tensor, latents: Tensor) -> Tensor:
    planned = run.plan.stage("denoise", phase)
    with run.stage("denoise", phase) as stage, prediction(run, models, planned.mode) as predict, torch.inference_mode():
        for done, stepped in enumerate(denoise(latents.to(run.device), scheduler, timesteps, predict), 1):
            latents = stepped
            stage.advance(done)
    return checked(latents, f"The model gave NaN in {planned.name}.").cpu()


@contextmanager
def prediction(run: Run, models: Models, mode: Mode) -> Iterator[Predict]:
    """The UNet with the attention of `mode`, as a guided prediction; what it does not need leaves the device."""
    unet = models.unet
    linear = models.linear if mode.attention == "linear" else {}
    originals = {path: module for path, module in self_attentions(unet).items() if path in linear}
    with mounted(unet, linear):
        for module in (originals if linear else models.linear).values():
            module.to("cpu")
        unet.to(run.device)
        yield guided_prediction(run, models.conditioning, runner(run, unet, mode), mode.together)


def runner(run: Run, unet: UNet2DConditionModel, mode: Mode) -> Whole | InStrips:
    """What runs `unet`, with its attention mounted, in this mode."""
    if mode.strips is None:
        return Whole(unet)
    strips = Strips(mode.strips, Storage(mode.place, run.device, run.dtype), Alone())

    def on_smaller(strips: Strips) -> None:
        size, place = strips.size, strips.storage.place
        run.recorder.notice(SMALLER.format(size.rows, size.tokens, MAPS[place]))

    return InStrips(unet, strips, on_smaller)


def guided_prediction(run: Run, conditioning: Conditioning, unet: Whole | InStrips, together: bool) -> Predict:
    """Both halves of guidance by `unet`: one after the other, or in one batch."""
    request = run.prepared.request
    how = {"scale": request.guidance_scale, "rescale": request.guidance_rescale}
    if together:
        both = conditioning.negative.beside(conditioning.positive)
        return guided_together(unet.predictor(both.hidden, both.added(request.size)), **how)
    positive, negative = (
        unet.predictor(half.hidden, half.added(request.size)) for half in (conditioning.positive, conditioning.negative)
    )
    return guided(positive, negative, **how)
