"""The stages of a run that make latents: each takes the Run and what the stage before made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from linfusion_cli.core.signals import critical_section
from linfusion_cli.mixers.linear.mount import mounted, self_attentions
from linfusion_cli.models.load.parts import Vae
from linfusion_cli.models.text.encode import Conditioning, TimeIds
from linfusion_cli.planning.estimate import DenoiseStrategy
from linfusion_cli.run.checkpoint.state import PhaseState, RunState
from linfusion_cli.run.stages.cache_keys import offload_networks
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.run.stages.controlnet import ControlNetRunner, activate_controlnets
from linfusion_cli.run.stages.convert import encode_source, upscale_latents
from linfusion_cli.run.stages.load import Models
from linfusion_cli.run.stages.precision import Overflowed, PrecisionFallback, explain_non_finite
from linfusion_cli.sampling.guidance import Predict, guided, guided_together, where_guided
from linfusion_cli.sampling.noise import SequentialNoise, phase_noise, step_noise
from linfusion_cli.sampling.phases import Phase
from linfusion_cli.sampling.probe import noise_correlation, prediction_type
from linfusion_cli.sampling.schedulers.schedule import Draw, Schedule
from linfusion_cli.sampling.upscalers.demofusion import ChannelStatistics, demofusion
from linfusion_cli.sampling.upscalers.pass_count import demofusion_of, phase_schedule
from linfusion_cli.sampling.upscalers.sdedit import denoise, sdedit
from linfusion_cli.settings.request import ImageRequest
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import Strips
from linfusion_cli.strips.pinned import PinnedMemory
from linfusion_cli.strips.storage import Storage
from linfusion_cli.unet.predict import StripUNet, WholeUNet

SMALLER = "Memory ran out: the step is repeated, and the phase goes on, in strips of {} rows and {} tokens, {}{}."
PROBED = "The model's config does not say what it predicts: by a probe, {} (its correlation with noise is {:.2f})."
HALVES_APART = ", both halves of guidance one after the other"
MAPS = {"device": "maps on the device", "skips": "skip connections on the host", "host": "maps on the host"}


def probe_prediction_type(run: RunContext, models: Models) -> RunContext:
    """The run with what the model predicts: where neither its config nor the request says so, by asking it."""
    facts, phase = run.resolved.facts, next((phase for phase in run.resolved.phases if phase.count), None)
    if facts.prediction_type or phase is None:
        return run
    side = min(facts.native_px, *phase.size.pair) // facts.vae_factor
    noise = phase_noise(0, 0, facts.latent_channels, side, side).to(run.device)
    schedule = phase_schedule(run.resolved.request, facts.scheduler_config, phase)
    uncontrolled = replace(models, controlnets=[])  # whose pictures are of another size
    unguided = replace(phase, guidance_scale=1.0)
    with build_predictions(run, uncontrolled, unguided, schedule) as (predict, _), explain_non_finite(run):
        correlation = noise_correlation(predict, noise, schedule.training_steps)
    run.recorder.notice(PROBED.format(prediction_type(correlation), correlation))
    return run.predicting(prediction_type(correlation))


def denoise_all(run: RunContext, vae: Vae) -> tuple[RunContext, Tensor]:
    """Latents [1, C, h, w] of the whole picture, phase by phase from what an earlier run has reached.

    Before them the run as it goes on: after NaN or Inf in half precision it has a wider dtype, and another plan.
    """
    reached, phases = run.checkpoints.initial_state(), run.resolved.phases
    if is_over(reached, phases[-1]):
        return run, reached.latents
    work = PrecisionFallback(run, vae)
    work.run = work.done(lambda run, models, _: probe_prediction_type(run, models), reached)
    for phase in phases[reached.begun.phase :]:
        if not is_over(reached, phase):
            reached = start_phase(work.run, vae, reached, phase)
            reached = work.done(partial(run_phase, phase=phase), reached)
            run.checkpoints.save(reached)
    offload_networks(run.model_cache)
    return work.run, reached.latents


def is_over(reached: RunState, phase: Phase) -> bool:
    """Whether `reached` is the end of `phase`."""
    return reached.is_done and reached.begun.phase == phase.index


def start_phase(run: RunContext, vae: Vae, reached: RunState, phase: Phase) -> RunState:
    """The beginning of `phase`, unless what was reached lies in it: noise, or a picture as latents."""
    if phase.from_noise or (reached.begun.phase == phase.index and reached.begun.encoded is not None):
        return reached
    if reached.latents is None:
        encoded = encode_source(run, vae, run.resolved.image)
        base = ChannelStatistics.of(encoded)
    else:
        encoded = upscale_latents(run, vae, reached.latents, phase)
        base = reached.begun.base or ChannelStatistics.of(reached.latents)
    reached = RunState(PhaseState(phase.index, encoded, base))
    run.checkpoints.save(reached)
    return reached


def run_phase(run: RunContext, models: Models, reached: RunState, phase: Phase) -> RunState:
    """The end of `phase`, of which `reached` is the beginning or a later step."""
    config, encoded = run.resolved.facts.scheduler_config, reached.begun.encoded
    draw, noise_now = build_noise(run, phase, reached)
    schedule = phase_schedule(run.resolved.request, config, phase, draw)
    if schedule is None:
        return replace(reached, latents=encoded, is_done=True)
    reached = reached.on(run.device)
    latents = reached.latents
    if latents is not None:
        schedule.load_state_dict(reached.scheduler)
    elif phase.from_noise:
        latents = schedule.scale_noise(draw()).to(run.device)
    with build_predictions(run, models, phase, schedule) as predictions:
        if phase.from_noise:
            steps = denoise(latents, schedule, predictions[0], reached.steps)
        else:
            steps = upscale_steps(run, reached, phase, schedule, latents, predictions)
        return run_steps(run, phase, reached, steps, lambda: (schedule.state(), noise_now()))


def build_noise(run: RunContext, phase: Phase, reached: RunState) -> tuple[Draw, Callable[[], Tensor | None]]:
    """What draws the noise of a phase's steps, and tells what has to be saved for it to be drawn on."""
    request, facts = run.resolved.request, run.resolved.facts
    size_lat = phase.size.divide(facts.vae_factor)
    shape = facts.latent_channels, size_lat.height, size_lat.width
    if not phase.from_noise:
        return partial(step_noise, request.seed, phase.index, *shape), lambda: None
    draw = SequentialNoise(request.seed, *shape, run.dtype)
    if reached.noise is not None:
        draw.load_state_dict(reached.noise)
    return draw, draw.state


def upscale_steps(
    run: RunContext,
    reached: RunState,
    phase: Phase,
    schedule: Schedule,
    latents: Tensor | None,
    predictions: tuple[Predict, Predict],
) -> Iterator[Tensor]:
    """The steps of a phase above the base, from its noised beginning or from `latents`, and what each makes."""
    request, encoded = run.resolved.request, reached.begun.encoded
    noise = phase_noise(request.seed, phase.index, *encoded.shape[1:]).to(run.device)
    start, predict = (encoded.to(run.device), noise), predictions[0]
    if request.upscaler == "sdedit":
        if latents is None:
            return sdedit(*start, schedule, predict)
        return denoise(latents, schedule, predict, reached.steps)
    base, method = reached.begun.base.to(run.device), demofusion_of(request, phase)
    return demofusion(*start, base, schedule, *predictions, method, latents, reached.steps)


def run_steps(
    run: RunContext,
    phase: Phase,
    reached: RunState,
    steps: Iterator[Tensor],
    state: Callable[[], tuple[dict[str, Any], Tensor | None]],
) -> RunState:
    """What is reached when all `steps` are done, with the stage recorded; `state` is what goes on with latents.

    Raises NonFinite, of which Overflowed leaves the steps that were done in the report.
    """
    overflowed = None
    with run.stage("denoise", phase.index, reached.steps) as stage, torch.inference_mode():
        while True:
            with critical_section():
                try:
                    with explain_non_finite(run, phase):
                        latents = next(steps, None)
                except Overflowed as error:
                    overflowed, stage.is_cut_short = error, True
                    break
                if latents is None:
                    break
                reached = RunState(reached.begun, reached.steps + 1, latents, False, *state())
                run.checkpoints.step(reached)
            stage.advance(reached.steps)
    if overflowed is not None:
        raise overflowed
    return RunState(reached.begun, reached.steps, reached.latents.cpu(), is_done=True)


@contextmanager
def build_predictions(
    run: RunContext, models: Models, phase: Phase, schedule: Schedule
) -> Iterator[tuple[Predict, Predict]]:
    """The UNet as `phase` runs it, as guided predictions, plain and dilated; what it does not need leaves the card."""
    unet, mode = models.unet, run.plan.stage("denoise", phase.index).mode
    linear = models.linear if mode.attention == "linear" else {}
    originals = {path: module for path, module in self_attentions(unet).items() if path in linear}
    with mounted(unet, linear), activate_controlnets(run, models.controlnets, phase, mode.attention) as controlnets:
        for module in (originals if linear else models.linear).values():
            module.to("cpu")
        unet.to(run.device)
        applies = where_guided(schedule, phase.guidance_scale, run.resolved.request.guidance_interval)
        how = {"scale": phase.guidance_scale, "rescale": run.resolved.request.guidance_rescale, "applies": applies}
        yield tuple(
            guide_prediction(run, models.conditioning, how_to_run, mode.together, how)
            for how_to_run in build_runners(run, unet, mode, phase, controlnets)
        )


def build_runners(
    run: RunContext,
    unet: UNet2DConditionModel,
    mode: DenoiseStrategy,
    phase: Phase,
    controlnets: list[ControlNetRunner],
) -> list[WholeUNet] | list[StripUNet]:
    """What runs `unet`, with its attention mounted, in this mode under `controls`: as it is, and dilated."""
    dilation = phase.dilation
    if mode.strips is None:
        whole = [control.whole() for control in controlnets]
        return [WholeUNet(unet, times, whole) for times in (1, dilation)]
    pinned = PinnedMemory(run.device, run.plan.stage("denoise", phase.index).need.pinned_bytes)
    strips = Strips(mode.strips, Storage(mode.place, run.device, run.dtype, pinned), SingleDevice())

    def on_smaller(strips: Strips, together: bool) -> None:
        size, place = strips.size, strips.storage.place
        changed = replace(mode, strips=size, place=place, together=mode.together and together)
        run.checkpoints.record_strategy("denoise", phase.index, changed)
        halves = HALVES_APART if mode.together and not together else ""
        run.recorder.notice(SMALLER.format(size.rows, size.tokens, MAPS[place], halves))

    in_strips = [control.in_strips(strips.storage) for control in controlnets]
    return [StripUNet(unet, replace(strips, dilation=times), on_smaller, in_strips) for times in (1, dilation)]


def guide_prediction(
    run: RunContext, conditioning: Conditioning, unet: WholeUNet | StripUNet, together: bool, how: dict[str, Any]
) -> Predict:
    """Both halves of guidance by `unet`: one after the other, or in one batch."""
    sizes = size_conditioning(run.resolved.request)
    positive, negative = conditioning.positive, conditioning.negative
    conditional = unet.predictor(positive.hidden, positive.added(sizes))
    if together:
        both = negative.concat(positive)
        return guided_together(conditional, unet.predictor(both.hidden, both.added(sizes)), **how)
    return guided(conditional, unet.predictor(negative.hidden, negative.added(sizes)), **how)


def size_conditioning(request: ImageRequest) -> TimeIds:
    """What SDXL is told of the picture's size: that of the finished picture in every phase, unless said otherwise."""
    return TimeIds(request.original_size or request.size, request.crop_top_left, request.target_size or request.size)
