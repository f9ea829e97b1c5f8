"""Load the LinFusion weights of a run and merge the model's own self-attention into them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffusers import UNet2DConditionModel

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.merge import PROJECTIONS, add_difference, copy_own_projections
from linfusion_cli.mixers.linear.mount import find_self_attentions
from linfusion_cli.mixers.linear.weights import count_unused_modules, load_weights
from linfusion_cli.models.locate.base import BaseWeights
from linfusion_cli.run.stages.context import RunContext

UNUSED_LAYERS = "Ignoring {} layers of the LinFusion weights {}: this smaller model does not have them."
DELTA_MERGED = (
    "Adding the fine-tune's self-attention changes since {} to the LinFusion weights (--linfusion-merge delta)."
)
PUBLISHED_WEIGHTS_USED = (
    "Using the published LinFusion weights; the fine-tune's own self-attention changes are ignored ({})."
)
NO_BASE = "its base model is not installed"
CUT_DOWN = "it has fewer layers than its base model"


def load_linear(run: RunContext, unet: UNet2DConditionModel) -> dict[str, LinearAttention]:
    """Load the linear attention to the CPU, by UNet path; {} if no phase needs it. LoRAs are merged later."""
    resolved = run.resolved
    if resolved.linfusion_folder is None:
        return {}
    linear = load_weights(resolved.linfusion_folder, unet, run.dtype)
    unused_layers = count_unused_modules(resolved.linfusion_folder, unet)
    if unused_layers:
        run.recorder.notify(UNUSED_LAYERS.format(unused_layers, resolved.linfusion_folder))
    merge_attention(run, unet, linear, is_cut_down=bool(unused_layers))
    return linear


def merge_attention(
    run: RunContext, unet: UNet2DConditionModel, linear: dict[str, LinearAttention], is_cut_down: bool
) -> None:
    """Merge the model's own self-attention into `linear` as --linfusion-merge says. Report what `auto` has chosen.

    `auto` leaves out a model with fewer layers than its base: layers with the same name may not correspond.
    """
    resolved, own, method = run.resolved, find_self_attentions(unet), run.resolved.request.linfusion_merge
    if method == "keep":
        copy_own_projections(linear, own)
    elif resolved.linfusion_base is None or (method == "auto" and is_cut_down):
        if (method, resolved.request.linfusion) == ("auto", "auto"):
            run.recorder.notify(PUBLISHED_WEIGHTS_USED.format(CUT_DOWN if is_cut_down else NO_BASE))
    elif not resolved.is_base_model:  # the base has no changes to add
        add_difference(linear, own, partial(BaseWeights(resolved.linfusion_base).read, names=PROJECTIONS))
        if method == "auto":
            run.recorder.notify(DELTA_MERGED.format(resolved.linfusion_base))


def check_base(base: Path, unet: UNet2DConditionModel) -> None:
    """Raise DataError, with the name of the tensor, if the UNet in `base` lacks a self-attention tensor of `unet`."""
    layers = find_self_attentions(unet).items()
    parameters = {f"{path}.{name}": module.get_parameter(name) for path, module in layers for name in PROJECTIONS}
    BaseWeights(base).check({name: tuple(parameter.shape) for name, parameter in parameters.items()})
