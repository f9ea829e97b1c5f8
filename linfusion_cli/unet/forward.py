"""A UNet's forward in strips: equal to its own with the same attention, in memory that follows the strip."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from linfusion_cli.strips.dilation import skip_row_padding
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.ops import Strips
from linfusion_cli.unet import resample
from linfusion_cli.unet.resnet import run_resnet
from linfusion_cli.unet.transformer import run_transformer
from linfusion_cli.unet.walk import walk

Added = Mapping[str, Tensor | list[Tensor]]
Residuals = deque[FeatureMap]  # of the skip connections, in the order they are made, then of the middle


class ControlNetBranch(Protocol):
    """What a ControlNet is to a forward; its `encoder` has the layers that see the latents."""

    encoder: nn.Module

    def residuals(
        self, run: Strips, latents: Tensor, timestep: Tensor, condition: UNetInputs, before: Residuals | None
    ) -> Residuals:
        """What it adds to each skip connection, in the order they are made, and to the middle.

        It adds that to what others have added `before`, and may write over it.
        """


@dataclass(frozen=True)
class UNetInputs:
    """What a UNet hears beside latents and timestep: `text` [B, T, C], `added`, and what few models have.

    `added` are SDXL's text_embeds and time_ids, and a list of IP-Adapters' image_embeds, [B, 1, D] or [B, 1, L, D].
    Each of the `controls` hears it too, without `timestep_cond`.
    """

    text: Tensor
    added: Added | None = None
    timestep_cond: Tensor | None = None
    controlnets: Sequence[ControlNetBranch] = ()

    def split(self, batch: int) -> Iterator[UNetInputs]:
        """The condition of each of `batch` latents alone."""
        for i in range(batch):
            one = slice(i, i + 1)
            added = None if self.added is None else {name: rows_of(value, one) for name, value in self.added.items()}
            times = None if self.timestep_cond is None else self.timestep_cond[one]
            yield UNetInputs(self.text[one], added, times, self.controlnets)


def rows_of(value: Tensor | list[Tensor], rows: slice) -> Tensor | list[Tensor]:
    """Some rows of a tensor, or of each of several."""
    return [tensor[rows] for tensor in value] if isinstance(value, list) else value[rows]


@torch.inference_mode()
def strip_forward(
    unet: UNet2DConditionModel, run: Strips, latents: Tensor, timestep: Tensor, condition: UNetInputs
) -> Tensor:
    """Latents [B, C, h, w] -> the UNet's prediction [B, C, h, w]; `unet` must pass `check_supported`."""
    networks = nn.ModuleList([unet, *(control.encoder for control in condition.controlnets)])  # each once
    residuals = None
    with skip_row_padding(networks, run.dilation):
        for control in condition.controlnets:
            residuals = control.residuals(run, latents, timestep, condition, residuals)
        embedding = compute_embedding(unet, latents, timestep, condition, condition.timestep_cond)
        heard = LayerConditioning(embedding, condition.text, project_image_embeds(unet, condition))
        operations = UNetOperations(unet, run, latents, heard, residuals)
        walk(unet, operations)
    return operations.prediction


def compute_embedding(
    network: nn.Module, latents: Tensor, timestep: Tensor, condition: UNetInputs, timestep_cond: Tensor | None = None
) -> Tensor:
    """The embedding [B, E] that every ResNet block hears: of the timestep and, for SDXL, of pooled text and sizes.

    A ControlNet has the parts that a UNet's methods look for, under the same names.
    """
    kind, heard = UNet2DConditionModel, {"encoder_hidden_states": condition.text, "added_cond_kwargs": condition.added}
    times = kind.get_time_embed(network, sample=latents, timestep=timestep)
    embedding = network.time_embedding(times, timestep_cond)
    added = kind.get_aug_embed(network, emb=embedding, **heard)
    embedding = embedding if added is None else embedding + added
    activation = getattr(network, "time_embed_act", None)
    return embedding if activation is None else activation(embedding)


def project_image_embeds(unet: UNet2DConditionModel, condition: UNetInputs) -> list[Tensor]:
    """What the UNet's IP-Adapters make of their pictures: [B, T, C] for each."""
    if unet.encoder_hid_proj is None:
        return []
    return [tokens.flatten(1, 2) for tokens in unet.encoder_hid_proj(condition.added["image_embeds"])]


@dataclass(frozen=True)
class LayerConditioning:
    """What the layers of one forward hear: the `embedding` [B, E], the `text` [B, T, C], and `pictures`, [B, T, C]."""

    embedding: Tensor
    text: Tensor
    images: Sequence[Tensor] = ()


class EncoderOperations:
    """The Encoding of one forward; what it keeps is for those to say who know what for."""

    def __init__(self, network: nn.Module, run: Strips, latents: Tensor, heard: LayerConditioning):
        self._network, self._run, self._latents, self._heard = network, run, latents, heard

    def conv_in(self) -> FeatureMap:
        return resample.run_conv_in(self._run, self._network.conv_in, self._latents)

    def resnet(self, block, parts: Sequence[FeatureMap]) -> FeatureMap:
        return run_resnet(self._run, block, parts, self._heard.embedding)

    def transformer(self, transformer, x: FeatureMap) -> FeatureMap:
        return run_transformer(self._run, transformer, x, self._heard.text, self._heard.images)

    def downsample(self, downsampler, x: FeatureMap) -> FeatureMap:
        return resample.run_downsample(self._run, downsampler, x)


class UNetOperations(EncoderOperations):
    """The Operations of one forward of a UNet, to whose maps `residuals` are added."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        run: Strips,
        latents: Tensor,
        heard: LayerConditioning,
        residuals: Residuals | None,
    ):
        super().__init__(unet, run, latents, heard)
        self._residuals = residuals
        self.prediction: Tensor | None = None

    def keep(self, x: FeatureMap) -> FeatureMap:
        if self._residuals is None:
            return self._run.storage.keep(x)
        return resample.add_residual(self._run, x, self._residuals.popleft())

    def keep_middle(self, x: FeatureMap) -> FeatureMap:
        return x if self._residuals is None else resample.add_residual(self._run, x, self._residuals.popleft())

    def upsample(self, upsampler, x: FeatureMap, like: FeatureMap, parts: int) -> list[FeatureMap]:
        return resample.run_upsample(self._run, upsampler, x, like.height, like.width, parts)

    def take(self, skip: FeatureMap) -> FeatureMap:
        skip.release()
        return skip

    def conv_out(self, x: FeatureMap) -> None:
        unet = self._network
        self.prediction = resample.run_conv_out(self._run, unet.conv_norm_out, unet.conv_act, unet.conv_out, x)
