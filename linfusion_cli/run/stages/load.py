"""What is made ready before a run paints: the run itself, what its prompts say, and its networks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from diffusers import UNet2DConditionModel

from linfusion_cli.hardware.cuda import forbid_tf32
from linfusion_cli.hardware.device import limit_device_memory
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.models.adapters.ip_adapter import encode_images, load_adapters
from linfusion_cli.models.adapters.lora import merge_lora
from linfusion_cli.models.adapters.textual_inversion import read_inversions
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.models.load.controlnet import LoadedControlNet
from linfusion_cli.models.load.parts import Vae, load_unet, load_vae
from linfusion_cli.models.text.encode import Conditioning, TextEncoder, TextEncoderChanges, encode_prompts
from linfusion_cli.planning.machine import cpu_notice
from linfusion_cli.run.checkpoint.manager import CheckpointManager
from linfusion_cli.run.checkpoint.state import RunState
from linfusion_cli.run.inputs.ip_adapters import read_image
from linfusion_cli.run.inputs.prompt_checks import literal_notice
from linfusion_cli.run.inputs.resolve import ResolvedRequest
from linfusion_cli.run.progress.recorder import RunRecorder
from linfusion_cli.run.stages.cache_keys import (
    NETWORKS,
    VAE,
    Networks,
    networks_key,
    offload_all,
    offload_text_encoders,
    text_key,
    vae_key,
)
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.run.stages.controlnet import load_controlnets
from linfusion_cli.run.stages.linear_attention import load_linear
from linfusion_cli.run.stages.plan import plan_run

UNHEARD = "The {} is too long for the model's text encoder, which did not hear its end: {!r}."
UNUSED = "Neither prompt has the token {!r} of a textual inversion, which does nothing."
THREADS = torch.get_num_threads()


@dataclass(frozen=True)
class Models:
    """The loaded models and what the UNet hears; `linear` is the attention that phases may mount in it."""

    unet: UNet2DConditionModel
    linear: dict[str, LinearAttention]
    vae: Vae
    conditioning: Conditioning
    controlnets: list[LoadedControlNet]


def start_run(
    resolved: ResolvedRequest, recorder: RunRecorder, checkpoints: CheckpointManager, model_cache: ModelCache
) -> RunContext:
    """Settle how this run works: as the one that it goes on with, if there is room; raises DoesNotFit.

    What it can use of the `shelf` stays there.
    """
    freeze_imports()
    torch.set_num_threads(checkpoints.threads or THREADS)  # sums depend on how they are shared out
    plan = plan_run(resolved, checkpoints.executed, offload_all(model_cache), model_cache, checkpoints.least_dtype)
    run = RunContext(resolved, plan, recorder, checkpoints, model_cache)
    checkpoints.describe = partial(describe_state, run)
    model_cache.evict_stale(NETWORKS, partial(networks_key, run))
    model_cache.evict_stale(VAE, partial(vae_key, run))
    recorder.device = run.device
    limit_device_memory(run.device, resolved.request.vram)
    forbid_tf32()
    recorder.planned(run.plan.need, run.plan.need.device_bytes if run.device.type == "cuda" else None)
    if notice := cpu_notice(plan.machine, plan.need.seconds):
        recorder.notice(notice)
    return run


def describe_state(run: RunContext, reached: RunState) -> str:
    """How far `reached` is, in words."""
    phase = run.resolved.phases[reached.begun.phase]
    if reached.is_done:
        return "the finished latents" if phase is run.resolved.phases[-1] else f"all of phase {phase.name}"
    steps = run.plan.stage("denoise", phase.index).steps if phase.count else 0
    return f"step {reached.steps} of {steps} in phase {phase.name}"


@cache
def freeze_imports() -> None:
    """What is there before the first run stays: collecting at each stage need not walk a million objects.

    Once in a process: what jobs of a batch leave must not stay.
    """
    gc.freeze()


def read_prompts(run: RunContext) -> Conditioning:
    """Both prompts, and pictures, as the UNet hears them; their encoders are off the device when this returns.

    A batch keeps text encoders where the run has room for them beside all else that it was planned with. Raises
    NonFinite where an encoder gives NaN or Inf.
    """
    request, resolved = run.resolved.request, run.resolved
    prompts = request.prompt, request.negative_prompt
    with run.recorder.stage("prompt", "text", None, 1, "prompts"):
        changes = TextEncoderChanges(resolved.loras, read_inversions(resolved.inversions), request.clip_skip)
        conditioning = encode_prompts(
            resolved.model, resolved.facts, *prompts, run.dtype, run.device, changes, partial(encoder, run)
        )
        if resolved.adapters:
            images = [read_image(adapter.image, run.recorder.notice) for adapter in resolved.adapters]
            conditioning = conditioning.with_images(encode_images(resolved.adapters, images, run.dtype, run.device))
        conditioning.check_finite()
    if literal := literal_notice(request):
        run.recorder.notice(literal)
    offload_text_encoders(run)
    for prompt, end in conditioning.unheard.items():
        run.recorder.notice(UNHEARD.format(prompt, end))
    for token in conditioning.unused:
        run.recorder.notice(UNUSED.format(token))
    return conditioning


def load(run: RunContext, vae: Vae, conditioning: Conditioning) -> Models:
    """The UNet and its linear attention, on the CPU until a phase mounts what it needs, beside the `vae`."""
    with run.recorder.stage("models", "load", None, 1, "models"):
        networks = run.model_cache.get(NETWORKS, partial(networks_key, run), partial(load_networks, run))
    return Models(networks.unet, networks.linear, vae, conditioning, networks.controlnets)


def encoder(run: RunContext, part: str, load: Callable[[], TextEncoder]) -> TextEncoder:
    """The text encoder that is the model's `part`, from the job before if that had the same."""
    return run.model_cache.get(part, partial(text_key, run), load)


def load_decoder(run: RunContext) -> Vae:
    """The VAE on the device."""
    with run.recorder.stage("vae", "load", None, 1, "models"):
        return get_vae(run)


def get_vae(run: RunContext) -> Vae:
    """The VAE on the device, loaded again if a job before went on in another dtype."""
    dtype, get = run.plan.machine.vae_dtype, partial(run.model_cache.get, VAE, partial(vae_key, run))
    make = partial(load_vae, run.resolved.vae, dtype, run.device)
    vae = get(make)
    if vae.dtype != dtype:
        del vae
        run.model_cache.drop(VAE)
        vae = get(make)
    return vae.to(run.device)


def load_networks(run: RunContext) -> Networks:
    """The UNet, its linear attention and ControlNets on the CPU, with all that is to change them."""
    resolved = run.resolved
    unet = load_unet(resolved.model, run.dtype)
    linear = load_linear(run, unet)
    for file, weight in resolved.loras:
        merge_lora(unet, linear, file, weight)
    load_adapters(unet, resolved.adapters)
    return Networks(unet, linear, load_controlnets(run, linear))
