"""The linear attention of a run: LinFusion's weights, and what of the model's own goes into them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffusers import UNet2DConditionModel

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.merge import PROJECTIONS, add_difference, keep_own
from linfusion_cli.mixers.linear.mount import self_attentions
from linfusion_cli.mixers.linear.weights import load_weights, unused
from linfusion_cli.models.locate.base import BaseWeights
from linfusion_cli.run.stages.context import RunContext

UNUSED = "{} of the layers in the LinFusion weights {} are not in this smaller model, and are not used."
MERGED = "What the model's self-attention has changed since {} goes into LinFusion's weights (--linfusion-merge delta)."
NOT_HEARD = "LinFusion's weights are used as published: what the model's self-attention has changed is not heard there."


def load_linear(run: RunContext, unet: UNet2DConditionModel) -> dict[str, LinearAttention]:
    """UNet path -> module that phases may mount, on the CPU; {} where none needs it. LoRAs come on top of it."""
    resolved = run.resolved
    if resolved.linfusion is None:
        return {}
    linear = load_weights(resolved.linfusion, unet, run.dtype)
    left = unused(resolved.linfusion, unet)
    if left:
        run.recorder.notice(UNUSED.format(left, resolved.linfusion))
    merge_attention(run, unet, linear, is_cut_down=bool(left))
    return linear


def merge_attention(
    run: RunContext, unet: UNet2DConditionModel, linear: dict[str, LinearAttention], is_cut_down: bool
) -> None:
    """Let into `linear` what the request wants of the model's own attention, and say what was chosen for it.

    The layers of a model that was cut down need not be those of its base with the same names.
    """
    resolved, own, way = run.resolved, self_attentions(unet), run.resolved.request.linfusion_merge
    if way == "keep":
        keep_own(linear, own)
    elif resolved.base is None or (way == "auto" and is_cut_down):
        if (way, resolved.request.linfusion) == ("auto", "auto"):
            run.recorder.notice(NOT_HEARD)
    elif not resolved.model_is_base:  # which has changed nothing
        add_difference(linear, own, partial(BaseWeights(resolved.base).read, names=PROJECTIONS))
        if way == "auto":
            run.recorder.notice(MERGED.format(resolved.base))


def check_base(base: Path, unet: UNet2DConditionModel) -> None:
    """Raise DataError naming the first self-attention of `unet` that its base, a UNet's folder, does not have so."""
    layers = self_attentions(unet).items()
    parameters = {f"{path}.{name}": module.get_parameter(name) for path, module in layers for name in PROJECTIONS}
    BaseWeights(base).check({name: tuple(parameter.shape) for name, parameter in parameters.items()})
