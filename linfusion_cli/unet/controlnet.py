"""ControlNets (Zhang, Rao and Agrawala, arXiv 2302.05543), run whole, or in strips together with the UNet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, ControlNetUnionModel
from torch import Tensor, nn

from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.dilation import dilate, unwrap_convolution
from linfusion_cli.strips.feature_map import FeatureMap, HostFeatureMap
from linfusion_cli.strips.ops import MapWriter, StripContext, as_nchw, as_nhwc
from linfusion_cli.strips.storage import Storage
from linfusion_cli.strips.stream import Convolution, Pointwise, StreamStage, stream
from linfusion_cli.unet.forward import EncoderOperations, LayerConditioning, Residuals, UNetInputs, compute_embedding
from linfusion_cli.unet.resample import ComputedMap, build_conv_in_map, fill_map
from linfusion_cli.unet.walk import walk_encoder

ControlNet = ControlNetModel | ControlNetUnionModel
ReadRows = Callable[[int, int], Tensor]  # (top, bottom) -> rows [1, bottom - top, W, 3] of an image, 0 to 1
CONTROL_ROWS = 32  # rows of a control image processed at a time


@dataclass(frozen=True)
class ActiveControlNet:
    """A ControlNet with its scale. `kind` is the index of the control type for union models, else None."""

    net: ControlNet
    scale: float
    kind: int | None

    def build_control_type(self, batch: int, like: Tensor) -> Tensor:
        """Return the one-hot control types of a union model [B, kinds]."""
        control_type = like.new_zeros(batch, self.net.config["num_control_type"])
        control_type[:, self.kind] = 1
        return control_type


@dataclass(frozen=True)
class WholeControlNet(ActiveControlNet):
    """An ActiveControlNet run in one piece with its original attention, for the control `image` [1, 3, H, W]."""

    image: Tensor

    def compute_residuals(
        self, latents: Tensor, timestep: Tensor, condition: UNetInputs, dilation: int
    ) -> tuple[list[Tensor], Tensor]:
        """Return the residuals of the skip connections, and that of the middle block."""
        image, batch = self.image.expand(len(latents), -1, -1, -1), len(latents)
        arguments = {"controlnet_cond": image}
        if self.kind is not None:
            arguments = {"controlnet_cond": [image], "control_type_idx": [self.kind]}
            arguments |= {"control_type": self.build_control_type(batch, latents)}
        arguments |= {"conditioning_scale": self.scale, "added_cond_kwargs": condition.added, "return_dict": False}
        with dilate(get_encoder(self.net), dilation):
            return self.net(latents, timestep, condition.text, **arguments)


class ControlImageEmbedding:
    """The embedding [1, h, w, C] of a control image. It is read-only and shared by all forwards of a phase."""

    def __init__(self, embedding: FeatureMap):
        self._map = embedding
        embedding.is_read_only = True

    def get_map(self, storage: Storage) -> FeatureMap:
        """Return the map. Move it to the host first if `storage` no longer keeps such maps on the device."""
        if storage.place != "device" and not isinstance(self._map, HostFeatureMap):
            host_map, device_map = storage.new_skip(*self._map.shape), self._map
            host_map.write(0, device_map.read(0, device_map.height))
            host_map.moments, host_map.is_read_only = device_map.moments, True
            self._map = host_map
        return self._map


@dataclass(frozen=True)
class StripControlNet(ActiveControlNet):
    """An ActiveControlNet with linear attention, run in strips, for the embedding of a control image."""

    image: ControlImageEmbedding

    @property
    def encoder(self) -> nn.Module:
        """The layers that process latents."""
        return get_encoder(self.net)

    def compute_residuals(
        self,
        context: StripContext,
        latents: Tensor,
        timestep: Tensor,
        condition: UNetInputs,
        previous: Residuals | None,
    ) -> Residuals:
        """Return the residuals; see `forward.ControlNetBranch`."""
        embedding = compute_embedding(self.net, latents, timestep, condition)
        if self.kind is not None:
            embedding = embedding + self._embed_control_type(len(latents), latents)
        operations = ControlNetOperations(
            self, context, latents, LayerConditioning(embedding, condition.text), previous
        )
        skips, middle = walk_encoder(self.net, operations)
        return Residuals([*skips, middle])

    def _embed_control_type(self, batch: int, like: Tensor) -> Tensor:
        """Return the embedding [B, E] of the control type."""
        projected = self.net.control_type_proj(self.build_control_type(batch, like).flatten()).unflatten(0, (batch, -1))
        return self.net.control_add_embedding(projected.flatten(1).to(like.dtype))


class ControlNetOperations(EncoderOperations):
    """The operations of one ControlNet forward. Its skip connections are the residuals for the UNet's maps."""

    def __init__(
        self,
        control: StripControlNet,
        context: StripContext,
        latents: Tensor,
        conditioning: LayerConditioning,
        previous: Residuals | None,
    ):
        super().__init__(control.net, context, latents, conditioning)
        self._control, self._previous = control, previous
        self._projections = iter(control.net.controlnet_down_blocks)

    def conv_in(self) -> FeatureMap:
        """Return the sum of the latents' first map and the image's embedding, without storing it."""
        net, hint = self._network, self._control.image.get_map(self._context.storage)
        first = build_conv_in_map(self._context, net.conv_in, self._latents)
        shift: Tensor | int = 0
        if self._control.kind is not None:
            shift = compute_union_shift(self._control, hint, first.compute_moments(self._context))

        def rows(top: int, bottom: int) -> Tensor:
            return first.read(top, bottom) + (hint.read(top, bottom) + shift)

        return ComputedMap(first.shape, rows).compute_moments(self._context)

    def store_skip(self, x: FeatureMap) -> FeatureMap:
        """Return the residual of a skip connection."""
        return self._project_residual(next(self._projections), x)

    def finish_middle(self, x: FeatureMap) -> FeatureMap:
        """Return the residual of the middle block."""
        return self._project_residual(self._network.controlnet_mid_block, x)

    def _project_residual(self, projection: nn.Module, x: FeatureMap) -> FeatureMap:
        previous = self._previous.popleft() if self._previous else None

        def rows(top: int, bottom: int) -> Tensor:
            projected = as_nhwc(projection(as_nchw(x.read(top, bottom)))) * self._control.scale
            return projected if previous is None else previous.read(top, bottom) + projected

        if isinstance(x, ComputedMap):
            return ComputedMap(x.shape, rows)
        target = previous or self._context.storage.new_skip(*x.shape)
        fill_map(self._context, target, rows, x)
        return target


def compute_union_shift(control: ActiveControlNet, hint: FeatureMap, first: FeatureMap) -> Tensor:
    """Return a union model's offset [B, 1, 1, C] for every pixel, from the means of the embedding and the first map."""
    net = control.net
    image, latents = (each.get_moments().mean.to(net.task_embedding.dtype) for each in (hint, first))
    image = (image + net.task_embedding[control.kind]).expand(len(latents), -1)
    x = torch.stack([image, latents], dim=1)
    for layer in net.transformer_layes:
        x = layer(x)
    return net.spatial_ch_projs(x[:, 0])[:, None, None]


def get_encoder(net: ControlNet) -> nn.ModuleList:
    """Return the layers of `net` that process latents, to which dilation applies."""
    return nn.ModuleList([net.conv_in, net.down_blocks, net.mid_block])


@torch.inference_mode()
def embed_control_image(
    net: ControlNet, read: ReadRows, height: int, width: int, storage: Storage
) -> ControlImageEmbedding:
    """Return the embedding of the control image of `height` x `width` that `read` provides, in `storage`.

    The image is streamed: convolutions process few rows at a time. The result is independent of dilation and strips.
    """
    stages, top = build_embedding_stages(net), 0
    downscale_factor = math.prod(stage.downscale_factor for stage in stages)
    channels = unwrap_convolution(net.controlnet_cond_embedding.conv_out).out_channels
    embedding = storage.new_skip(1, height // downscale_factor, width // downscale_factor, channels)
    result = MapWriter(embedding)
    for rows in stream(stages, reorder_channels(net, read), height, CONTROL_ROWS):
        result.write(top, rows)
        top += rows.shape[1]
    return ControlImageEmbedding(result.close(SingleDevice()))


def build_embedding_stages(net: ControlNet) -> list[StreamStage]:
    """Return the stages that reduce a control image to the size of the latents."""
    layers = net.controlnet_cond_embedding
    stages = ([Convolution(layer), Pointwise(F.silu)] for layer in (layers.conv_in, *layers.blocks))
    return [*chain.from_iterable(stages), Convolution(layers.conv_out)]


def reorder_channels(net: ControlNet, read: ReadRows) -> ReadRows:
    """Return `read` with colour channels in the order that `net` expects."""
    if net.config["controlnet_conditioning_channel_order"] == "rgb":
        return read
    return lambda top, bottom: read(top, bottom).flip(-1)
