"""The phase loop: denoise the latents phase by phase, from the state of an earlier run or from the beginning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linfusion_cli.core.signals import critical_section
from linfusion_cli.models.load.networks import Vae
from linfusion_cli.run.checkpoint.state import PhaseState, RunState
from linfusion_cli.run.stages.cache_keys import offload_networks
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.run.stages.convert import encode_source, upscale_latents
from linfusion_cli.run.stages.load import Models
from linfusion_cli.run.stages.precision import HalfPrecisionOverflow, PrecisionFallback, explain_non_finite
from linfusion_cli.run.stages.predictors import build_predictions
from linfusion_cli.sampling.guidance import Predict
from linfusion_cli.sampling.noise import SequentialNoise, draw_phase_noise, draw_step_noise
from linfusion_cli.sampling.phases import Phase
from linfusion_cli.sampling.probe import classify_prediction, measure_noise_correlation
from linfusion_cli.sampling.schedulers.schedule import DrawStepNoise, Schedule
from linfusion_cli.sampling.upscalers.demofusion import ChannelStatistics, demofusion
from linfusion_cli.sampling.upscalers.pass_count import build_demofusion, build_phase_schedule
from linfusion_cli.sampling.upscalers.sdedit import denoise, sdedit

PROBED_PREDICTION_TYPE = (
    "The model's config has no prediction_type; a probe detected {} (correlation with noise: {:.2f})."
)


def probe_prediction_type(run: RunContext, models: Models) -> RunContext:
    """Return the run with a prediction type. Probe the model if neither its config nor the request has one."""
    facts, phase = run.resolved.facts, next((phase for phase in run.resolved.phases if phase.active_steps), None)
    if facts.prediction_type or phase is None:
        return run
    side = min(facts.native_px, *phase.size.pair) // facts.vae_factor
    noise = draw_phase_noise(0, 0, facts.latent_channels, side, side).to(run.device)
    schedule = build_phase_schedule(run.resolved.request, facts.scheduler_config, phase)
    assert schedule is not None  # the phase has steps
    uncontrolled = replace(models, controlnets=[])  # their images have another size than the probe
    unguided = replace(phase, guidance_scale=1.0)
    with build_predictions(run, uncontrolled, unguided, schedule) as (predict, _), explain_non_finite(run):
        correlation = measure_noise_correlation(predict, noise, schedule.training_steps)
    run.recorder.notify(PROBED_PREDICTION_TYPE.format(classify_prediction(correlation), correlation))
    return run.with_prediction_type(classify_prediction(correlation))


def denoise_all(run: RunContext, vae: Vae) -> tuple[RunContext, Tensor]:
    """Run all remaining phases. Return the run and the final latents [1, C, h, w].

    After NaN or Inf in half precision the returned run has a wider dtype and another plan.
    """
    state = run.checkpoints.initial_state()
    if not is_phase_done(state, run.resolved.phases[-1]):
        run, state = run_phases(run, vae, state)
    assert state.latents is not None  # the state after a phase always has latents
    return run, state.latents


def run_phases(run: RunContext, vae: Vae, state: RunState) -> tuple[RunContext, RunState]:
    """Run the phases that are not done in `state`. Return the run with its current dtype, and the final state."""
    fallback = PrecisionFallback(run, vae)
    fallback.run = fallback.execute(lambda run, models, _: probe_prediction_type(run, models), state)
    for phase in run.resolved.phases[state.phase_state.phase :]:
        if not is_phase_done(state, phase):
            state = start_phase(fallback.run, vae, state, phase)
            state = fallback.execute(partial(denoise_phase, phase=phase), state)
            run.checkpoints.save(state)
    offload_networks(run.model_cache)
    return fallback.run, state


def is_phase_done(state: RunState, phase: Phase) -> bool:
    """Return whether `state` is the end of `phase`."""
    return state.is_done and state.phase_state.phase == phase.index


def start_phase(run: RunContext, vae: Vae, state: RunState, phase: Phase) -> RunState:
    """Return the initial state of `phase`, or `state` if the phase starts from noise or has already started.

    The initial state has the source image or the result of the previous phase, encoded at the size of `phase`.
    """
    if phase.from_noise or (state.phase_state.phase == phase.index and state.phase_state.start_latents is not None):
        return state
    if state.latents is None:
        assert run.resolved.source_image is not None  # the first phase does not start from noise
        encoded = encode_source(run, vae, run.resolved.source_image)
        base = ChannelStatistics.from_latents(encoded)
    else:
        encoded = upscale_latents(run, vae, state.latents, phase)
        base = state.phase_state.base_statistics or ChannelStatistics.from_latents(state.latents)
    state = RunState(PhaseState(phase.index, encoded, base))
    run.checkpoints.save(state)
    return state


def denoise_phase(run: RunContext, models: Models, state: RunState, phase: Phase) -> RunState:
    """Run `phase` from `state`, its initial state or a later step. Return its final state."""
    config, encoded = run.resolved.facts.scheduler_config, state.phase_state.start_latents
    draw, read_noise_state = build_noise(run, phase, state)
    schedule = build_phase_schedule(run.resolved.request, config, phase, draw)
    if schedule is None:
        return replace(state, latents=encoded, is_done=True)
    state = state.to(run.device)
    latents = state.latents
    if latents is not None:
        schedule.load_state_dict(state.scheduler_state)
    elif phase.from_noise:
        latents = schedule.scale_noise(draw(0)).to(run.device)
    with build_predictions(run, models, phase, schedule) as predictions:
        if phase.from_noise:
            assert latents is not None
            steps = denoise(latents, schedule, predictions[0], state.steps)
        else:
            steps = iterate_upscale_steps(run, state, phase, schedule, latents, predictions)
        return run_steps(run, phase, state, steps, lambda: (schedule.state_dict(), read_noise_state()))


def build_noise(run: RunContext, phase: Phase, state: RunState) -> tuple[DrawStepNoise, Callable[[], Tensor | None]]:
    """Return a function that draws the noise of a step, and one that reads the generator state for a checkpoint."""
    request, facts = run.resolved.request, run.resolved.facts
    size_lat = phase.size.divide(facts.vae_factor)
    shape = facts.latent_channels, size_lat.height, size_lat.width
    if not phase.from_noise:
        return partial(draw_step_noise, request.seed, phase.index, *shape), lambda: None
    draw = SequentialNoise(request.seed, *shape, run.dtype)
    if state.noise_state is not None:
        draw.set_state(state.noise_state)
    return draw, draw.get_state


def iterate_upscale_steps(
    run: RunContext,
    state: RunState,
    phase: Phase,
    schedule: Schedule,
    latents: Tensor | None,
    predictions: tuple[Predict, Predict],
) -> Iterator[Tensor]:
    """Return an iterator over the latents after each step of a phase above the base.

    The phase continues from `latents`, or starts from its encoded image with noise added if they are None.
    """
    request, encoded = run.resolved.request, state.phase_state.start_latents
    assert encoded is not None  # start_phase has encoded them
    noise = draw_phase_noise(request.seed, phase.index, *encoded.shape[1:]).to(run.device)
    start, (predict, _) = (encoded.to(run.device), noise), predictions
    if request.upscaler == "sdedit":
        if latents is None:
            return sdedit(*start, schedule, predict)
        return denoise(latents, schedule, predict, state.steps)
    base, parameters = state.phase_state.base_statistics, build_demofusion(request, phase)
    assert base is not None  # start_phase has measured them
    return demofusion(*start, base.to(run.device), schedule, *predictions, parameters, latents, state.steps)


def run_steps(
    run: RunContext,
    phase: Phase,
    state: RunState,
    steps: Iterator[Tensor],
    read_state: Callable[[], tuple[dict[str, Any], Tensor | None]],
) -> RunState:
    """Run all `steps` as a recorded stage and save checkpoints. Return the final state.

    `read_state` returns the states of the scheduler and of the noise generator that belong to the last latents.
    Raise NonFinite for NaN or Inf. After a HalfPrecisionOverflow, the report has a stage with the steps before it.
    """
    overflow = None
    with run.stage("denoise", phase.index, state.steps) as stage, torch.inference_mode():
        while True:
            with critical_section():
                try:
                    with explain_non_finite(run, phase):
                        latents = next(steps, None)
                except HalfPrecisionOverflow as error:
                    overflow, stage.is_cut_short = error, True
                    break
                if latents is None:
                    break
                state = RunState(state.phase_state, state.steps + 1, latents, False, *read_state())
                run.checkpoints.maybe_save(state)
            stage.advance(state.steps)
    if overflow is not None:
        raise overflow
    assert state.latents is not None  # the phase has steps
    return RunState(state.phase_state, state.steps, state.latents.cpu(), is_done=True)
