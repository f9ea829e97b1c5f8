"""A UNet and its conditioning as one function of latents and timestep."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from diffusers import UNet2DConditionModel
from torch import Tensor


def predictor(
    unet: UNet2DConditionModel, text: Tensor, added: Mapping[str, Tensor] | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """(latents [1, C, H, W], timestep []) -> prediction [1, C, H, W], both in the latents' dtype.

    `text` [1, T, C] and `added` (SDXL's `text_embeds` [1, C] and `time_ids` [1, 6]) are moved to the UNet once.
    """
    where = {"device": unet.device, "dtype": unet.dtype}
    text = text.to(**where)
    added = {name: tensor.to(**where) for name, tensor in added.items()} if added else None

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        prediction = unet(latents.to(**where), timestep, text, added_cond_kwargs=added, return_dict=False)[0]
        return prediction.to(latents)

    return predict
