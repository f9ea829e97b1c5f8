"""The stages of a run that make latents: each takes the Run and what the stage before made."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from linfusion_cli.attention.linear import LinearAttention
from linfusion_cli.attention.mount import mounted, self_attentions
from linfusion_cli.device import limit_device_memory
from linfusion_cli.jobs.adapter import read_picture
from linfusion_cli.jobs.attention import load_linear
from linfusion_cli.jobs.control import ActingControl, acting, load_controls
from linfusion_cli.jobs.kept import NETWORKS, VAE, Networks, networks_key, settle_text, text_key, to_host, vae_key
from linfusion_cli.jobs.pixels import begun_with
from linfusion_cli.jobs.plan import plan_run
from linfusion_cli.jobs.prepare import Prepared
from linfusion_cli.jobs.prompts import literal_notice
from linfusion_cli.jobs.record import Recorder
from linfusion_cli.jobs.run import Run, checked
from linfusion_cli.jobs.shelf import Shelf
from linfusion_cli.models.inversion import read_inversions
from linfusion_cli.models.ip_adapter import encode_pictures, load_adapters
from linfusion_cli.models.load import Vae, load_unet, load_vae
from linfusion_cli.models.load_controlnet import LoadedControl
from linfusion_cli.models.lora import merge_lora
from linfusion_cli.models.text import Conditioning, Encoder, SizeConditioning, TextChanges, encode_prompts
from linfusion_cli.planning.needs import Mode
from linfusion_cli.request import PictureRequest
from linfusion_cli.sampling.demofusion import Channels, demofusion
from linfusion_cli.sampling.denoise import denoise, sdedit
from linfusion_cli.sampling.guidance import Predict, guided, guided_together, where_guided
from linfusion_cli.sampling.ladder import Phase
from linfusion_cli.sampling.noise import InTurn, phase_noise, step_noise
from linfusion_cli.sampling.passes import demofusion_of, phase_schedule
from linfusion_cli.sampling.probe import noise_correlation, prediction_type
from linfusion_cli.sampling.schedule import Schedule
from linfusion_cli.strips.exchange import Alone
from linfusion_cli.strips.ops import Strips
from linfusion_cli.strips.storage import Storage
from linfusion_cli.unet.predict import InStrips, Whole

UNHEARD = "The {} is too long for the model's text encoder, which did not hear its end: {!r}."
UNUSED = "Neither prompt has the token {!r} of a textual inversion, which does nothing."
SMALLER = "Memory ran out: the step is repeated, and the phase goes on, in strips of {} rows and {} tokens, {}."
PROBED = "The model's config does not say what it predicts: by a probe, {} (its correlation with noise is {:.2f})."
MAPS = {"device": "maps on the device", "skips": "skip connections on the host", "host": "maps on the host"}


@dataclass(frozen=True)
class Models:
    """The loaded models and what the UNet hears; `linear` is the attention that phases may mount in it."""

    unet: UNet2DConditionModel
    linear: dict[str, LinearAttention]
    vae: Vae
    conditioning: Conditioning
    controls: list[LoadedControl]


def begin(prepared: Prepared, recorder: Recorder, shelf: Shelf) -> Run:
    """Settle how this run works; raises DoesNotFit where it cannot. What it can use of the `shelf` stays there."""
    freeze_imports()
    run = Run(prepared, plan_run(prepared, to_host(shelf), shelf), recorder, shelf)
    shelf.expect(NETWORKS, partial(networks_key, run))
    shelf.expect(VAE, partial(vae_key, run))
    recorder.device = run.device
    limit_device_memory(run.device, prepared.request.vram)
    recorder.planned(run.plan.need, run.plan.need.device_bytes if run.device.type == "cuda" else None)
    return run


@cache
def freeze_imports() -> None:
    """What is there before the first run stays: collecting at each stage need not walk a million objects.

    Once in a process: what jobs of a batch leave must not stay.
    """
    gc.freeze()


def read_prompts(run: Run) -> Conditioning:
    """Both prompts, and pictures, as the UNet hears them; their encoders are off the device when this returns.

    A batch keeps text encoders where the run has room for them beside all else that it was planned with.
    """
    request, prepared = run.prepared.request, run.prepared
    prompts = request.prompt, request.negative_prompt
    with run.recorder.stage("prompt", "text", None, 1, "prompts"):
        changes = TextChanges(prepared.loras, read_inversions(prepared.inversions), request.clip_skip)
        conditioning = encode_prompts(
            prepared.model, prepared.facts, *prompts, run.dtype, run.device, changes, partial(encoder, run)
        )
        if prepared.adapters:
            pictures = [read_picture(adapter.image, run.recorder.notice) for adapter in prepared.adapters]
            conditioning = conditioning.with_images(encode_pictures(prepared.adapters, pictures, run.dtype, run.device))
    if literal := literal_notice(request):
        run.recorder.notice(literal)
    settle_text(run)
    for prompt, end in conditioning.unheard.items():
        run.recorder.notice(UNHEARD.format(prompt, end))
    for token in conditioning.unused:
        run.recorder.notice(UNUSED.format(token))
    return conditioning


def load(run: Run, conditioning: Conditioning) -> Models:
    """The VAE on the device; the UNet and its linear attention on the CPU, until a phase mounts what it needs."""
    with run.recorder.stage("models", "load", None, 1, "models"):
        vae = planned_vae(run)
        networks = run.shelf.get(NETWORKS, partial(networks_key, run), partial(load_networks, run))
    return Models(networks.unet, networks.linear, vae, conditioning, networks.controls)


def encoder(run: Run, part: str, load: Callable[[], Encoder]) -> Encoder:
    """The text encoder that is the model's `part`, from the job before if that had the same."""
    return run.shelf.get(part, partial(text_key, run), load)


def planned_vae(run: Run) -> Vae:
    """The VAE on the device, loaded again if a job before went on in another dtype."""
    dtype, get = run.plan.machine.vae_dtype, partial(run.shelf.get, VAE, partial(vae_key, run))
    make = partial(load_vae, run.prepared.vae, dtype, run.device)
    vae = get(make)
    if vae.dtype != dtype:
        del vae
        run.shelf.drop(VAE)
        vae = get(make)
    return vae.to(run.device)


def load_networks(run: Run) -> Networks:
    """The UNet, its linear attention and ControlNets on the CPU, with all that is to change them."""
    prepared = run.prepared
    unet = load_unet(prepared.model, run.dtype)
    linear = load_linear(run, unet)
    for file, weight in prepared.loras:
        merge_lora(unet, linear, file, weight)
    load_adapters(unet, prepared.adapters)
    return Networks(unet, linear, load_controls(run, linear))


def settled(run: Run, models: Models) -> Run:
    """The run with what the model predicts: where neither its config nor the request says so, by asking it."""
    facts, phase = run.prepared.facts, next((phase for phase in run.prepared.phases if phase.count), None)
    if facts.prediction_type or phase is None:
        return run
    side = min(facts.native_px, *phase.size.pair) // facts.vae_factor
    noise = phase_noise(0, 0, facts.latent_channels, side, side).to(run.device)
    schedule = phase_schedule(run.prepared.request, facts.scheduler_config, phase)
    uncontrolled = replace(models, controls=[])  # whose pictures are of another size
    with prediction(run, uncontrolled, replace(phase, guidance_scale=1.0), schedule) as (predict, _):
        correlation = noise_correlation(predict, noise, schedule.training_steps)
    run.recorder.notice(PROBED.format(prediction_type(correlation), correlation))
    return run.predicting(prediction_type(correlation))


def first(run: Run, models: Models) -> tuple[Tensor, Channels]:
    """Latents of the first phase, and what the channels of those it came from are like: of the base, or the picture."""
    if run.prepared.picture is None:
        latents = base(run, models)
        return latents, Channels.of(latents)
    encoded = begun_with(run, models.vae, run.prepared.picture)
    channels = Channels.of(encoded)
    return grow(run, models, encoded, channels, run.prepared.phases[0]), channels


def base(run: Run, models: Models) -> Tensor:
    """Latents [1, C, h, w] of the first phase's picture, from noise."""
    request, facts, phase = run.prepared.request, run.prepared.facts, run.prepared.phases[0]
    size_lat = phase.size.divided(facts.vae_factor)
    draw = InTurn(request.seed, facts.latent_channels, size_lat.height, size_lat.width, run.dtype)
    schedule = phase_schedule(request, facts.scheduler_config, phase, draw)
    latents = schedule.started(draw()).to(run.device)
    with prediction(run, models, phase, schedule) as (predict, _):
        return stepped(run, phase, denoise(latents, schedule, predict))


def grow(run: Run, models: Models, encoded: Tensor, base: Channels, phase: Phase) -> Tensor:
    """The picture that `phase` begins with as latents [1, C, h, w], noised and denoised again.

    `base` is what the channels of the ladder's first latents were like.
    """
    request, facts = run.prepared.request, run.prepared.facts
    shape = encoded.shape[1:]
    draw = partial(step_noise, request.seed, phase.index, *shape)
    schedule = phase_schedule(request, facts.scheduler_config, phase, draw)
    if schedule is None:
        return encoded
    start = encoded.to(run.device), phase_noise(request.seed, phase.index, *shape).to(run.device)
    with prediction(run, models, phase, schedule) as (predict, predict_dilated):
        if request.upscaler == "sdedit":
            return stepped(run, phase, sdedit(*start, schedule, predict))
        method, base = demofusion_of(request, phase), base.to(run.device)
        return stepped(run, phase, demofusion(*start, base, schedule, predict, predict_dilated, method))


def stepped(run: Run, phase: Phase, steps: Iterator[Tensor]) -> Tensor:
    """The last latents of `steps`, on the CPU, with the stage recorded."""
    with run.stage("denoise", phase.index) as stage, torch.inference_mode():
        for done, reached in enumerate(steps, 1):
            latents = reached
            stage.advance(done)
    return checked(latents, f"The model gave NaN in {phase.name}.").cpu()


@contextmanager
def prediction(run: Run, models: Models, phase: Phase, schedule: Schedule) -> Iterator[tuple[Predict, Predict]]:
    """The UNet as `phase` runs it, as guided predictions, plain and dilated; what it does not need leaves the card."""
    unet, mode = models.unet, run.plan.stage("denoise", phase.index).mode
    linear = models.linear if mode.attention == "linear" else {}
    originals = {path: module for path, module in self_attentions(unet).items() if path in linear}
    with mounted(unet, linear), acting(run, models.controls, phase, mode.attention) as controls:
        for module in (originals if linear else models.linear).values():
            module.to("cpu")
        unet.to(run.device)
        applies = where_guided(schedule, phase.guidance_scale, run.prepared.request.guidance_interval)
        how = {"scale": phase.guidance_scale, "rescale": run.prepared.request.guidance_rescale, "applies": applies}
        yield tuple(
            guided_prediction(run, models.conditioning, how_to_run, mode.together, how)
            for how_to_run in runners(run, unet, mode, phase.dilation, controls)
        )


def runners(
    run: Run, unet: UNet2DConditionModel, mode: Mode, dilation: int, controls: list[ActingControl]
) -> list[Whole] | list[InStrips]:
    """What runs `unet`, with its attention mounted, in this mode under `controls`: as it is, and dilated."""
    if mode.strips is None:
        whole = [control.whole() for control in controls]
        return [Whole(unet, times, whole) for times in (1, dilation)]
    strips = Strips(mode.strips, Storage(mode.place, run.device, run.dtype), Alone())

    def on_smaller(strips: Strips) -> None:
        size, place = strips.size, strips.storage.place
        run.recorder.notice(SMALLER.format(size.rows, size.tokens, MAPS[place]))

    in_strips = [control.in_strips(strips.storage) for control in controls]
    return [InStrips(unet, replace(strips, dilation=times), on_smaller, in_strips) for times in (1, dilation)]


def guided_prediction(
    run: Run, conditioning: Conditioning, unet: Whole | InStrips, together: bool, how: dict[str, Any]
) -> Predict:
    """Both halves of guidance by `unet`: one after the other, or in one batch."""
    sizes = size_conditioning(run.prepared.request)
    positive, negative = conditioning.positive, conditioning.negative
    conditional = unet.predictor(positive.hidden, positive.added(sizes))
    if together:
        both = negative.beside(positive)
        return guided_together(conditional, unet.predictor(both.hidden, both.added(sizes)), **how)
    return guided(conditional, unet.predictor(negative.hidden, negative.added(sizes)), **how)


def size_conditioning(request: PictureRequest) -> SizeConditioning:
    """What SDXL is told of the picture's size: that of the finished picture in every phase, unless said otherwise."""
    return SizeConditioning(
        request.original_size or request.size, request.crop_top_left, request.target_size or request.size
    )
