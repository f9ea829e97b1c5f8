"""The linear attention of a run: LinFusion's weights, and what of the model's own goes into them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffusers import UNet2DConditionModel

from linfusion_cli.attention.linear import LinearAttention
from linfusion_cli.attention.merge import PROJECTIONS, add_difference, keep_own
from linfusion_cli.attention.mount import self_attentions
from linfusion_cli.attention.weights import load_weights, unused
from linfusion_cli.jobs.run import Run
from linfusion_cli.models.base import BaseWeights

UNUSED = "{} of the layers in the LinFusion weights {} are not in this smaller model, and are not used."


def load_linear(run: Run, unet: UNet2DConditionModel) -> dict[str, LinearAttention]:
    """UNet path -> module that phases may mount, on the CPU; {} where none needs it. LoRAs come on top of it."""
    prepared, own = run.prepared, self_attentions(unet)
    if prepared.linfusion is None:
        return {}
    linear = load_weights(prepared.linfusion, unet, run.dtype)
    if left := unused(prepared.linfusion, unet):
        run.recorder.notice(UNUSED.format(left, prepared.linfusion))
    if prepared.request.linfusion_merge == "keep":
        keep_own(linear, own)
    if prepared.base is not None:
        add_difference(linear, own, partial(BaseWeights(prepared.base).read, names=PROJECTIONS))
    return linear


def check_base(base: Path, unet: UNet2DConditionModel) -> None:
    """Raise DataError naming the first self-attention of `unet` that its base, a UNet's folder, does not have so."""
    layers = self_attentions(unet).items()
    parameters = {f"{path}.{name}": module.get_parameter(name) for path, module in layers for name in PROJECTIONS}
    BaseWeights(base).check({name: tuple(parameter.shape) for name, parameter in parameters.items()})
