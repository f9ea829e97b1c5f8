"""Start a run: plan it, encode its prompts and load its models."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from diffusers import UNet2DConditionModel

from linfusion_cli.hardware.cuda import forbid_tf32, limit_device_memory
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.models.adapters.ip_adapter import encode_images, load_adapters
from linfusion_cli.models.adapters.lora import merge_lora
from linfusion_cli.models.adapters.textual_inversion import read_inversions
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.models.load.controlnet import LoadedControlNet
from linfusion_cli.models.load.networks import Vae, load_unet, load_vae
from linfusion_cli.models.text.encode import Conditioning, TextEncoder, TextEncoderChanges, encode_prompts
from linfusion_cli.planning.machine import build_cpu_notice
from linfusion_cli.run.checkpoint.manager import CheckpointManager
from linfusion_cli.run.checkpoint.state import RunState
from linfusion_cli.run.inputs.ip_adapters import read_image
from linfusion_cli.run.inputs.prompt_checks import build_literal_notice
from linfusion_cli.run.inputs.resolve import ResolvedRequest
from linfusion_cli.run.progress.recorder import RunRecorder
from linfusion_cli.run.stages.cache_keys import (
    NETWORKS,
    VAE,
    Networks,
    build_networks_key,
    build_text_key,
    build_vae_key,
    move_network,
    offload_all,
    offload_text_encoders,
)
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.run.stages.controlnet import load_controlnets
from linfusion_cli.run.stages.linear_attention import load_linear
from linfusion_cli.run.stages.plan import plan_run

TRUNCATED_PROMPT = "The {} exceeds the text encoder's 77-token limit; ignored: {!r}."
UNUSED_TOKEN = "The textual inversion {!r} has no effect: its token is in neither prompt."
DEFAULT_THREADS = torch.get_num_threads()


@dataclass(frozen=True)
class Models:
    """The loaded models and the conditioning. `linear` has the linear attention that a phase can mount, by path."""

    unet: UNet2DConditionModel
    linear: dict[str, LinearAttention]
    vae: Vae
    conditioning: Conditioning
    controlnets: list[LoadedControlNet]


def start_run(
    resolved: ResolvedRequest, recorder: RunRecorder, checkpoints: CheckpointManager, model_cache: ModelCache
) -> RunContext:
    """Plan the run and prepare the device. A resumed run repeats the earlier plan if it fits.

    Drop models from `model_cache` that this run does not use. Raise OutOfMemoryBudget if no plan fits.
    """
    freeze_imports()
    torch.set_num_threads(checkpoints.threads or DEFAULT_THREADS)  # the number of threads affects rounding in sums
    plan = plan_run(resolved, checkpoints.previous_stages, offload_all(model_cache), model_cache, checkpoints.min_dtype)
    run = RunContext(resolved, plan, recorder, checkpoints, model_cache)
    checkpoints.describe_state = partial(describe_state, run)
    model_cache.evict_stale(NETWORKS, partial(build_networks_key, run))
    model_cache.evict_stale(VAE, partial(build_vae_key, run))
    recorder.device = run.device
    limit_device_memory(run.device, resolved.request.execution.vram)
    forbid_tf32()
    recorder.report_plan(run.plan.estimate, run.plan.estimate.device_bytes if run.device.type == "cuda" else None)
    if notice := build_cpu_notice(plan.machine, plan.estimate.seconds):
        recorder.notify(notice)
    return run


def describe_state(run: RunContext, state: RunState) -> str:
    """Return a description of how far `state` is."""
    phase = run.resolved.phases[state.phase_state.phase]
    if state.is_done:
        return "the finished latents" if phase is run.resolved.phases[-1] else f"all of phase {phase.name}"
    steps = run.plan.find_stage("denoise", phase.index).steps if phase.active_steps else 0
    return f"step {state.steps} of {steps} in phase {phase.name}"


@cache
def freeze_imports() -> None:
    """Exclude the objects that exist before the first run from garbage collection, which runs between stages.

    Cached to run once per process: objects of earlier batch jobs must stay collectable.
    """
    gc.freeze()


def encode_conditioning(run: RunContext) -> Conditioning:
    """Encode both prompts and the image prompts. The encoders are off the device afterwards.

    The text encoders stay cached on the host if the plan leaves room for them. Raise NonFinite if an encoder gives NaN
    or Inf.
    """
    request, resolved = run.resolved.request, run.resolved
    prompts = request.prompt, request.negative_prompt
    with run.recorder.stage("encode_prompts", None, 1, "prompts"):
        changes = TextEncoderChanges(resolved.loras, read_inversions(resolved.textual_inversions), request.clip_skip)
        conditioning = encode_prompts(
            resolved.model, resolved.facts, *prompts, run.dtype, run.device, changes, partial(get_text_encoder, run)
        )
        if resolved.ip_adapters:
            images = [read_image(adapter.image, run.recorder.notify) for adapter in resolved.ip_adapters]
            conditioning = conditioning.with_images(encode_images(resolved.ip_adapters, images, run.dtype, run.device))
        conditioning.check_finite()
    if literal := build_literal_notice(request):
        run.recorder.notify(literal)
    offload_text_encoders(run)
    for prompt, end in conditioning.truncated.items():
        run.recorder.notify(TRUNCATED_PROMPT.format(prompt, end))
    for token in conditioning.unused_tokens:
        run.recorder.notify(UNUSED_TOKEN.format(token))
    return conditioning


def load_models(run: RunContext, vae: Vae, conditioning: Conditioning) -> Models:
    """Load the UNet, its linear attention and the ControlNets to the CPU. Each phase moves modules to the device."""
    with run.recorder.stage("load", None, 1, "models"):
        networks = run.model_cache.get(NETWORKS, partial(build_networks_key, run), partial(load_networks, run))
    return Models(networks.unet, networks.linear, vae, conditioning, networks.controlnets)


def get_text_encoder(run: RunContext, part: str, load: Callable[[], TextEncoder]) -> TextEncoder:
    """Return the text encoder `part` of the model from the cache, or `load` it."""
    return run.model_cache.get(part, partial(build_text_key, run), load)


def prepare_vae(run: RunContext) -> Vae:
    """Return the VAE on the device, as a recorded stage."""
    with run.recorder.stage("load", None, 1, "models"):
        return get_cached_vae(run)


def get_cached_vae(run: RunContext) -> Vae:
    """Return the VAE on the device from the cache, or load it. Load it again if an earlier job changed its dtype."""
    dtype, get = run.plan.machine.vae_dtype, partial(run.model_cache.get, VAE, partial(build_vae_key, run))
    load = partial(load_vae, run.resolved.vae, dtype, run.device)
    vae = get(load)
    if vae.dtype != dtype:
        del vae
        run.model_cache.evict(VAE)
        vae = get(load)
    move_network(vae, run.device)
    return vae


def load_networks(run: RunContext) -> Networks:
    """Load the UNet, its linear attention and the ControlNets to the CPU, and apply LoRAs and IP-Adapters."""
    resolved = run.resolved
    unet = load_unet(resolved.model, run.dtype)
    linear = load_linear(run, unet)
    for file, weight in resolved.loras:
        merge_lora(unet, linear, file, weight)
    load_adapters(unet, resolved.ip_adapters)
    return Networks(unet, linear, load_controlnets(run, linear))
