"""A UNet and its conditioning as a function of latents and timestep: run whole, or in strips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from linfusion_cli.hardware.device import free_memory, is_out_of_memory
from linfusion_cli.strips.dilation import dilate
from linfusion_cli.strips.ops import Strips
from linfusion_cli.unet.check import check_control, check_supported
from linfusion_cli.unet.controlnet import StripControlNet, WholeControlNet
from linfusion_cli.unet.forward import Added, UNetInputs, strip_forward

Predict = Callable[[Tensor, Tensor], Tensor]  # (latents [B, C, h, w], timestep []) -> prediction [B, C, h, w]


class WholeUNet:
    """Runs a UNet in one piece under `controls`, all convolutions that see the latents dilated by `dilation`."""

    def __init__(self, unet: UNet2DConditionModel, dilation: int = 1, controlnets: Sequence[WholeControlNet] = ()):
        self._unet, self._dilation, self._controls = unet, dilation, controlnets

    def predictor(self, text: Tensor, added: Added | None) -> Predict:
        """The UNet under `text` [B, T, C] and `added`: SDXL's `text_embeds` [B, C] and `time_ids` [B, 6], and
        IP-Adapters' `image_embeds`, a list of [B, 1, D] or [B, 1, L, D]."""
        return _predictor(self._unet, UNetInputs(text, added), self._forward)

    def _forward(self, latents: Tensor, timestep: Tensor, condition: UNetInputs) -> Tensor:
        more = {"added_cond_kwargs": condition.added, "return_dict": False}
        skips: list[Tensor] = []
        for control in self._controls:
            found, middle = control.residuals(latents, timestep, condition, self._dilation)
            skips = [sum(both) for both in zip(skips, found, strict=True)] if skips else found
            more["down_block_additional_residuals"] = skips
            more["mid_block_additional_residual"] = more.get("mid_block_additional_residual", 0) + middle
        with dilate(self._unet, self._dilation):
            return self._unet(latents, timestep, condition.text, **more)[0]


class StripUNet:
    """Runs a UNet with linear attention under `controls` in strips.

    Where memory runs out, both halves of guidance run one after the other from then on, not in one batch, and then
    strips become smaller. `on_smaller` hears of it, and whether halves may still run together. Raises DataError for a
    network that has a part which cannot be run so.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        run: Strips,
        on_smaller: Callable[[Strips, bool], None],
        controlnets: Sequence[StripControlNet] = (),
    ):
        check_supported(unet)
        for control in controlnets:
            check_control(control.net)
        self._unet, self._run, self._on_smaller, self._controls = unet, run, on_smaller, controlnets
        self._together = True

    def predictor(self, text: Tensor, added: Added | None) -> Predict:
        """As `Whole.predictor`."""
        return _predictor(self._unet, UNetInputs(text, added, controlnets=self._controls), self._forward)

    def _forward(self, latents: Tensor, timestep: Tensor, condition: UNetInputs) -> Tensor:
        """A forward is repeated when it runs out of memory: it changes nothing but what it returns."""
        while self._together or len(latents) == 1:
            try:
                return strip_forward(self._unet, self._run, latents, timestep, condition)
            except (RuntimeError, MemoryError) as error:
                smaller = self._run if len(latents) > 1 else self._run.smaller()
                if not is_out_of_memory(error) or smaller is None:
                    raise
            # Only here, as the error holds on to what the forward had.
            self._use(smaller, together=self._together and len(latents) == 1)
        halves = zip(latents.split(1), condition.split(len(latents)), strict=True)
        return torch.cat([self._forward(half, timestep, alone) for half, alone in halves])

    def _use(self, smaller: Strips, together: bool) -> None:
        self._run.storage.settle()
        self._run, self._together = smaller, together
        free_memory(smaller.storage.device)
        self._on_smaller(smaller, together)


def _predictor(
    unet: UNet2DConditionModel, condition: UNetInputs, forward: Callable[[Tensor, Tensor, UNetInputs], Tensor]
) -> Predict:
    """`forward` under `condition`, which moves to the UNet once; latents come and go in their own dtype."""
    where = {"device": unet.device, "dtype": unet.dtype}
    added = {name: moved(value, where) for name, value in condition.added.items()} if condition.added else None
    condition = replace(condition, text=condition.text.to(**where), added=added)

    @torch.inference_mode()
    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        return forward(latents.to(**where), timestep, condition).to(latents)

    return predict


def moved(value: Tensor | list[Tensor], where: dict[str, Any]) -> Tensor | list[Tensor]:
    """A tensor, or each of several, to a device and dtype."""
    return [tensor.to(**where) for tensor in value] if isinstance(value, list) else value.to(**where)
