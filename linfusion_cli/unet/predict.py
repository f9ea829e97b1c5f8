"""A UNet with fixed conditioning as a function of latents and timestep, run whole or in strips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from linfusion_cli.hardware.peak import release_memory
from linfusion_cli.hardware.torch_errors import is_out_of_memory
from linfusion_cli.strips.dilation import dilate
from linfusion_cli.strips.ops import StripContext
from linfusion_cli.unet.check import check_controlnet, check_supported
from linfusion_cli.unet.controlnet import StripControlNet, WholeControlNet
from linfusion_cli.unet.forward import AddedCondKwargs, UNetInputs, strip_forward

Predict = Callable[[Tensor, Tensor], Tensor]  # (latents [B, C, h, w], timestep []) -> prediction [B, C, h, w]


class WholeUNet:
    """Runs a UNet with `controlnets` in one piece. Convolutions that process latents are dilated by `dilation`."""

    def __init__(self, unet: UNet2DConditionModel, dilation: int = 1, controlnets: Sequence[WholeControlNet] = ()):
        self._unet, self._dilation, self._controls = unet, dilation, controlnets

    def build_predictor(self, text: Tensor, added: AddedCondKwargs | None) -> Predict:
        """Return the UNet as a function, for the conditioning `text` [B, T, C] and `added`.

        `added` holds SDXL's `text_embeds` [B, C] and `time_ids` [B, 6], and IP-Adapters' `image_embeds`, a list of
        [B, 1, D] or [B, 1, L, D].
        """
        return _bind(self._unet, UNetInputs(text, added), self._forward)

    def _forward(self, latents: Tensor, timestep: Tensor, condition: UNetInputs) -> Tensor:
        arguments: dict[str, Any] = {"added_cond_kwargs": condition.added, "return_dict": False}
        skips: list[Tensor] = []
        for control in self._controls:
            residuals, middle = control.compute_residuals(latents, timestep, condition, self._dilation)
            skips = [cast(Tensor, sum(pair)) for pair in zip(skips, residuals, strict=True)] if skips else residuals
            arguments["down_block_additional_residuals"] = skips
            arguments["mid_block_additional_residual"] = arguments.get("mid_block_additional_residual", 0) + middle
        with dilate(self._unet, self._dilation):
            return self._unet(latents, timestep, condition.text, **arguments)[0]


class StripUNet:
    """Runs a UNet with linear attention and `controlnets` in strips. Raise DataError if a network is unsupported.

    If memory runs out, the two halves of guidance are no longer run in one batch; after that, strips become smaller.
    `on_memory_fallback` is called with the new settings, and whether the halves can still run in one batch.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        context: StripContext,
        on_memory_fallback: Callable[[StripContext, bool], None],
        controlnets: Sequence[StripControlNet] = (),
    ):
        check_supported(unet)
        for control in controlnets:
            check_controlnet(control.net)
        self._unet, self._context, self._controls = unet, context, controlnets
        self._on_memory_fallback = on_memory_fallback
        self._batched = True

    def build_predictor(self, text: Tensor, added: AddedCondKwargs | None) -> Predict:
        """Return the UNet as a function, as WholeUNet.build_predictor does."""
        return _bind(self._unet, UNetInputs(text, added, controlnets=self._controls), self._forward)

    def _forward(self, latents: Tensor, timestep: Tensor, condition: UNetInputs) -> Tensor:
        """Run a forward, and repeat it with less memory if memory runs out; a failed forward has no side effects."""
        while self._batched or len(latents) == 1:
            try:
                return strip_forward(self._unet, self._context, latents, timestep, condition)
            except (RuntimeError, MemoryError) as error:
                smaller = self._context if len(latents) > 1 else self._context.reduce_memory()
                if not is_out_of_memory(error) or smaller is None:
                    raise
            # Outside the except clause: the error's traceback references the memory of the failed forward.
            self._switch_to(smaller, batched=self._batched and len(latents) == 1)
        halves = zip(latents.split(1), condition.split(len(latents)), strict=True)
        return torch.cat([self._forward(half, timestep, inputs) for half, inputs in halves])

    def _switch_to(self, context: StripContext, batched: bool) -> None:
        self._context.storage.wait_downloads()
        self._context, self._batched = context, batched
        release_memory(context.storage.device)
        self._on_memory_fallback(context, batched)


def _bind(
    unet: UNet2DConditionModel, condition: UNetInputs, forward: Callable[[Tensor, Tensor, UNetInputs], Tensor]
) -> Predict:
    """Return `forward` with fixed inputs, moved to the UNet once. Predictions have the dtype of the latents."""
    where = {"device": unet.device, "dtype": unet.dtype}
    added = {name: move_to(value, where) for name, value in condition.added.items()} if condition.added else None
    condition = replace(condition, text=condition.text.to(**where), added=added)

    @torch.inference_mode()
    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return forward(latents.to(**where), timestep, condition).to(latents)

    return predict


def move_to(value: Tensor | list[Tensor], where: dict[str, Any]) -> Tensor | list[Tensor]:
    """Move a tensor, or each tensor in a list, to a device and dtype."""
    return [tensor.to(**where) for tensor in value] if isinstance(value, list) else value.to(**where)
