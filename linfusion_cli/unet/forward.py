"""Run a UNet's forward in strips. The result equals the plain forward with the same attention."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from linfusion_cli.strips.dilation import skip_row_padding
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.ops import StripContext
from linfusion_cli.unet import resample
from linfusion_cli.unet.resnet import run_resnet
from linfusion_cli.unet.transformer import run_transformer
from linfusion_cli.unet.walk import Network, walk_unet

AddedCondKwargs = Mapping[str, Tensor | list[Tensor]]
Residuals = deque[FeatureMap]  # of the skip connections in order of computation, then of the middle block


class ControlNetBranch(Protocol):
    """A ControlNet as seen by a forward."""

    @property
    def encoder(self) -> nn.Module:
        """The layers that process latents."""
        ...

    def compute_residuals(
        self,
        context: StripContext,
        latents: Tensor,
        timestep: Tensor,
        condition: UNetInputs,
        previous: Residuals | None,
    ) -> Residuals:
        """Return the residuals of the skip connections, in order of computation, and of the middle block.

        They are added to the `previous` residuals of other ControlNets, which can be overwritten.
        """
        ...


@dataclass(frozen=True)
class UNetInputs:
    """The UNet's inputs besides latents and timestep: `text` [B, T, C], `added` and optional inputs of some models.

    `added` holds SDXL's text_embeds and time_ids, and a list of IP-Adapters' image_embeds, [B, 1, D] or [B, 1, L, D].
    The `controlnets` receive the same inputs, except `timestep_cond`.
    """

    text: Tensor
    added: AddedCondKwargs | None = None
    timestep_cond: Tensor | None = None
    controlnets: Sequence[ControlNetBranch] = ()

    def split(self, batch: int) -> Iterator[UNetInputs]:
        """Yield the inputs of each of `batch` latents."""
        for i in range(batch):
            selection = slice(i, i + 1)
            added = self.added and {name: slice_batch(value, selection) for name, value in self.added.items()}
            timestep_cond = None if self.timestep_cond is None else self.timestep_cond[selection]
            yield UNetInputs(self.text[selection], added, timestep_cond, self.controlnets)


def slice_batch(value: Tensor | list[Tensor], rows: slice) -> Tensor | list[Tensor]:
    """Return a slice along the batch dimension of a tensor, or of each tensor in a list."""
    return [tensor[rows] for tensor in value] if isinstance(value, list) else value[rows]


@torch.inference_mode()
def strip_forward(
    unet: UNet2DConditionModel, context: StripContext, latents: Tensor, timestep: Tensor, condition: UNetInputs
) -> Tensor:
    """Return the UNet's prediction [B, C, h, w] for latents [B, C, h, w]. `unet` must pass `check_supported`."""
    # A module list visits a network that several ControlNets share only once.
    networks = nn.ModuleList([unet, *(control.encoder for control in condition.controlnets)])
    residuals = None
    with skip_row_padding(networks, context.dilation):
        for control in condition.controlnets:
            residuals = control.compute_residuals(context, latents, timestep, condition, residuals)
        embedding = compute_embedding(unet, latents, timestep, condition, condition.timestep_cond)
        conditioning = LayerConditioning(embedding, condition.text, project_image_embeds(unet, condition))
        operations = UNetOperations(unet, context, latents, conditioning, residuals)
        walk_unet(unet, operations)
    assert operations.prediction is not None  # set by conv_out
    return operations.prediction


def compute_embedding(
    network: Network, latents: Tensor, timestep: Tensor, condition: UNetInputs, timestep_cond: Tensor | None = None
) -> Tensor:
    """Return the embedding [B, E] for all ResNet blocks: of the timestep and, for SDXL, of pooled text and sizes.

    `network` is a UNet or a ControlNet; both have the attributes that the UNet's methods use.
    """
    methods: Any = UNet2DConditionModel  # its methods are called on ControlNets too
    arguments = {"encoder_hidden_states": condition.text, "added_cond_kwargs": condition.added}
    times = methods.get_time_embed(network, sample=latents, timestep=timestep)
    embedding = cast(nn.Module, network.time_embedding)(times, timestep_cond)
    added = methods.get_aug_embed(network, emb=embedding, **arguments)
    embedding = embedding if added is None else embedding + added
    activation = getattr(network, "time_embed_act", None)
    return embedding if activation is None else activation(embedding)


def project_image_embeds(unet: UNet2DConditionModel, condition: UNetInputs) -> list[Tensor]:
    """Return the image tokens [B, T, C] of each of the UNet's IP-Adapters."""
    if unet.encoder_hid_proj is None:
        return []
    return [tokens.flatten(1, 2) for tokens in unet.encoder_hid_proj(cast(Mapping, condition.added)["image_embeds"])]


@dataclass(frozen=True)
class LayerConditioning:
    """The conditioning of all layers in one forward: `embedding` [B, E], `text` [B, T, C] and `images` [B, T, C]."""

    embedding: Tensor
    text: Tensor
    images: Sequence[Tensor] = ()


class EncoderOperations:
    """The encoder's operations in one forward. Subclasses define how skip connections are handled."""

    def __init__(self, network: Network, context: StripContext, latents: Tensor, conditioning: LayerConditioning):
        self._network, self._context, self._latents, self._conditioning = network, context, latents, conditioning

    def conv_in(self) -> FeatureMap:
        """Apply the input convolution to the latents."""
        return resample.run_conv_in(self._context, cast(nn.Module, self._network.conv_in), self._latents)

    def resnet(self, block: ResnetBlock2D, parts: Sequence[FeatureMap]) -> FeatureMap:
        """Apply a ResNet block to the concatenation of `parts`."""
        return run_resnet(self._context, block, parts, self._conditioning.embedding)

    def transformer(self, transformer: Transformer2DModel, x: FeatureMap) -> FeatureMap:
        """Apply a transformer in place."""
        return run_transformer(self._context, transformer, x, self._conditioning.text, self._conditioning.images)

    def downsample(self, downsampler: Downsample2D, x: FeatureMap) -> FeatureMap:
        """Return `x` downsampled."""
        return resample.run_downsample(self._context, downsampler, x)


class UNetOperations(EncoderOperations):
    """The operations of one UNet forward. `residuals` of ControlNets are added to the maps."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        context: StripContext,
        latents: Tensor,
        conditioning: LayerConditioning,
        residuals: Residuals | None,
    ):
        super().__init__(unet, context, latents, conditioning)
        self._unet, self._residuals = unet, residuals
        self.prediction: Tensor | None = None

    def store_skip(self, x: FeatureMap) -> FeatureMap:
        """Return `x` as a skip connection, with its residual added."""
        if self._residuals is None:
            return self._context.storage.store_skip(x)
        return resample.add_residual(self._context, x, self._residuals.popleft())

    def finish_middle(self, x: FeatureMap) -> FeatureMap:
        """Return the middle block's result with its residual added."""
        return x if self._residuals is None else resample.add_residual(self._context, x, self._residuals.popleft())

    def upsample(self, upsampler: Upsample2D, x: FeatureMap, like: FeatureMap, parts: int) -> list[FeatureMap]:
        """Return `x` upsampled to the size of `like`, its channels split into `parts` maps."""
        return resample.run_upsample(self._context, upsampler, x, like.height, like.width, parts)

    def load_skip(self, skip: FeatureMap) -> FeatureMap:
        """Release a skip connection for its last read."""
        skip.release()
        return skip

    def conv_out(self, x: FeatureMap) -> None:
        """Compute the prediction from the last map."""
        norm, activation = cast(nn.GroupNorm, self._unet.conv_norm_out), cast(nn.Module, self._unet.conv_act)
        self.prediction = resample.run_conv_out(self._context, norm, activation, self._unet.conv_out, x)
