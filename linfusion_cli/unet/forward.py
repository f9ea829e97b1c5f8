"""A UNet's forward in strips: equal to its own with the same attention, in memory that follows the strip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from linfusion_cli.strips.dilation import rows_supplied
from linfusion_cli.strips.ops import Strips, Writer
from linfusion_cli.strips.storage import Map
from linfusion_cli.unet import resample
from linfusion_cli.unet.resnet import run_resnet
from linfusion_cli.unet.transformer import run_transformer
from linfusion_cli.unet.walk import walk

Added = Mapping[str, Tensor | list[Tensor]]


@dataclass(frozen=True)
class Condition:
    """What a UNet hears beside latents and timestep: `text` [B, T, C], `added`, and what few models have.

    `added` are SDXL's text_embeds and time_ids, and a list of IP-Adapters' image_embeds, [B, 1, D] or [B, 1, L, D].
    `residuals` (one per skip connection, in the order they are made) and `mid_residual` are ControlNet's, [B, C, h, w].
    """

    text: Tensor
    added: Added | None = None
    timestep_cond: Tensor | None = None
    residuals: Sequence[Tensor] = ()
    mid_residual: Tensor | None = None


@torch.inference_mode()
def strip_forward(
    unet: UNet2DConditionModel, run: Strips, latents: Tensor, timestep: Tensor, condition: Condition
) -> Tensor:
    """Latents [B, C, h, w] -> the UNet's prediction [B, C, h, w]; `unet` must pass `check_supported`."""
    operations = Forward(unet, run, latents, embedded(unet, latents, timestep, condition), condition)
    with rows_supplied(unet, run.dilation):
        walk(unet, operations)
    return operations.prediction


def embedded(unet: UNet2DConditionModel, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """The embedding [B, E] that every ResNet block hears: of the timestep and, for SDXL, of pooled text and sizes."""
    embedding = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timestep), condition.timestep_cond)
    added = unet.get_aug_embed(emb=embedding, encoder_hidden_states=condition.text, added_cond_kwargs=condition.added)
    embedding = embedding if added is None else embedding + added
    return embedding if unet.time_embed_act is None else unet.time_embed_act(embedding)


def picture_tokens(unet: UNet2DConditionModel, condition: Condition) -> list[Tensor]:
    """What the UNet's IP-Adapters make of their pictures: [B, T, C] for each."""
    if unet.encoder_hid_proj is None:
        return []
    return [tokens.flatten(1, 2) for tokens in unet.encoder_hid_proj(condition.added["image_embeds"])]


class Forward:
    """The Operations of one forward."""

    def __init__(
        self, unet: UNet2DConditionModel, run: Strips, latents: Tensor, embedding: Tensor, condition: Condition
    ):
        self._unet, self._run, self._latents = unet, run, latents
        self._embedding, self._condition = embedding, condition
        self._pictures = picture_tokens(unet, condition)
        self.prediction: Tensor | None = None

    def conv_in(self) -> Map:
        return resample.run_conv_in(self._run, self._unet.conv_in, self._latents)

    def resnet(self, block, parts: Sequence[Map]) -> Map:
        return run_resnet(self._run, block, parts, self._embedding)

    def transformer(self, transformer, x: Map) -> Map:
        return run_transformer(self._run, transformer, x, self._condition.text, self._pictures)

    def downsample(self, downsampler, x: Map) -> Map:
        return resample.run_downsample(self._run, downsampler, x)

    def upsample(self, upsampler, x: Map, like: Map, parts: int) -> list[Map]:
        return resample.run_upsample(self._run, upsampler, x, like.height, like.width, parts)

    def keep(self, x: Map) -> Map:
        return self._run.storage.keep(x)

    def take(self, skip: Map) -> Map:
        skip.release()
        return skip

    def add_residual(self, skip: Map, index: int, x: Map) -> Map:
        if not self._condition.residuals:
            return skip
        if skip is not x:
            skip.release()
        added = self._added(skip, self._condition.residuals[index])
        return self.keep(added)

    def add_mid_residual(self, x: Map) -> Map:
        residual = self._condition.mid_residual
        return x if residual is None else self._added(x, residual)

    def _added(self, x: Map, residual: Tensor) -> Map:
        """`x` with `residual` [B, C, h, w], which may wait on another device, added to it: over `x` if that is free."""
        result = Writer(self._run.like(x, x.channels) if x.kept else x)
        for top, bottom in self._run.bands(x.height, x.width):
            rows = residual[:, :, top:bottom].permute(0, 2, 3, 1)
            result.write(top, x.read(top, bottom) + rows.to(self._run.storage.device))
        return result.close(self._run.exchange)

    def conv_out(self, x: Map) -> None:
        unet = self._unet
        self.prediction = resample.run_conv_out(self._run, unet.conv_norm_out, unet.conv_act, unet.conv_out, x)
