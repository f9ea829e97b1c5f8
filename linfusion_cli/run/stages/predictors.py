"""Build the prediction functions of a phase: the UNet with guidance, run whole or in strips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from diffusers import UNet2DConditionModel

from linfusion_cli.core.events import StageKey
from linfusion_cli.mixers.linear.mount import find_self_attentions, mount_modules
from linfusion_cli.models.text.encode import Conditioning, PromptEmbedding, TimeIds
from linfusion_cli.planning.strategies import DenoiseStrategy
from linfusion_cli.run.stages.cache_keys import move_network
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.run.stages.controlnet import ControlNetRunner, activate_controlnets
from linfusion_cli.run.stages.load import Models
from linfusion_cli.sampling.guidance import Predict, build_guidance_filter, guide, guide_batched
from linfusion_cli.sampling.phases import Phase
from linfusion_cli.sampling.schedulers.schedule import Schedule
from linfusion_cli.settings.request import Request
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import StripContext
from linfusion_cli.strips.pinned import PinnedMemory
from linfusion_cli.strips.storage import Storage
from linfusion_cli.unet.predict import StripUNet, WholeUNet

REDUCED_STRIPS = (
    "Out of memory: repeating the step; the rest of the phase runs in strips of {} rows and {} tokens, {}{}."
)
SEQUENTIAL_GUIDANCE = ", with the two halves of guidance one after the other"
PLACEMENTS = {
    "device": "feature maps on the device",
    "skips": "skip connections on the host",
    "host": "feature maps on the host",
}


@contextmanager
def build_predictions(
    run: RunContext, models: Models, phase: Phase, schedule: Schedule
) -> Iterator[tuple[Predict, Predict]]:
    """Yield the guided predictions of the UNet for `phase`: a plain and a dilated one.

    The UNet and the attention modules that the phase needs are on the device; the other modules are moved to the host.
    """
    unet, strategy = models.unet, run.plan.find_stage("denoise", phase.index).strategy
    assert isinstance(strategy, DenoiseStrategy)
    linear = models.linear if strategy.attention == "linear" else {}
    originals = {path: module for path, module in find_self_attentions(unet).items() if path in linear}
    with (
        mount_modules(unet, linear),
        activate_controlnets(run, models.controlnets, phase, strategy.attention) as controlnets,
    ):
        for module in (originals if linear else models.linear).values():
            module.to("cpu")
        move_network(unet, run.device)
        applies = build_guidance_filter(schedule, phase.guidance_scale, run.resolved.request.guidance_interval)
        guidance = {"scale": phase.guidance_scale, "rescale": run.resolved.request.guidance_rescale, "applies": applies}
        plain, dilated = (
            guide_prediction(run, models.conditioning, runner, strategy.batched, guidance)
            for runner in build_runners(run, unet, strategy, phase, controlnets)
        )
        yield plain, dilated


def build_runners(
    run: RunContext,
    unet: UNet2DConditionModel,
    strategy: DenoiseStrategy,
    phase: Phase,
    controlnets: list[ControlNetRunner],
) -> list[WholeUNet] | list[StripUNet]:
    """Return two runners of `unet`, without and with dilation. The attention of the phase is already mounted.

    If memory runs out, the strips of a StripUNet become smaller. This is recorded in the checkpoint and reported.
    """
    dilations = (1, phase.dilation)
    if strategy.strips is None:
        whole = [control.build_whole() for control in controlnets]
        return [WholeUNet(unet, dilation, whole) for dilation in dilations]
    estimate = run.plan.find_stage("denoise", phase.index).estimate
    assert estimate is not None  # only missing for a UNet that cannot run in strips
    pinned = PinnedMemory(run.device, estimate.pinned_bytes)
    strips = StripContext(strategy.strips, Storage(strategy.place, run.device, run.dtype, pinned), SingleDevice())

    def on_memory_fallback(strips: StripContext, batched: bool) -> None:
        size, place = strips.size, strips.storage.place
        changed = replace(strategy, strips=size, place=place, batched=strategy.batched and batched)
        run.checkpoints.record_strategy(StageKey("denoise", phase.index), changed)
        halves = SEQUENTIAL_GUIDANCE if strategy.batched and not batched else ""
        run.recorder.notify(REDUCED_STRIPS.format(size.rows, size.tokens, PLACEMENTS[place], halves))

    in_strips = [control.build_strips(strips.storage) for control in controlnets]
    return [
        StripUNet(unet, replace(strips, dilation=dilation), on_memory_fallback, in_strips) for dilation in dilations
    ]


def guide_prediction(
    run: RunContext, conditioning: Conditioning, unet: WholeUNet | StripUNet, batched: bool, guidance: dict[str, Any]
) -> Predict:
    """Return the guided prediction of `unet`. Its two halves run in one batch if `batched`, else in sequence."""
    time_ids = build_time_ids(run.resolved.request)

    def build_predictor(embedding: PromptEmbedding) -> Predict:
        return unet.build_predictor(embedding.hidden, embedding.build_added_conditions(time_ids))

    positive, negative = conditioning.positive, conditioning.negative
    conditional = build_predictor(positive)
    if batched:
        return guide_batched(conditional, build_predictor(negative.concat(positive)), **guidance)
    return guide(conditional, build_predictor(negative), **guidance)


def build_time_ids(request: Request) -> TimeIds:
    """Return SDXL's size conditioning: the size of the final image in every phase, unless the request sets another."""
    top, left = request.crop_top_left
    return TimeIds(request.original_size or request.size, (top, left), request.target_size or request.size)
