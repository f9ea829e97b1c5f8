"""ControlNets (Zhang, Rao and Agrawala, arXiv 2302.05543) beside a UNet: whole, or their encoders in its strips."""

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
from linfusion_cli.strips.dilation import dilate, inner
from linfusion_cli.strips.feature_map import FeatureMap, HostFeatureMap
from linfusion_cli.strips.ops import Strips, Writer, as_nchw, as_nhwc
from linfusion_cli.strips.storage import Storage
from linfusion_cli.strips.stream import Convolution, Pointwise, StreamStage, stream
from linfusion_cli.unet.forward import EncoderOperations, LayerConditioning, Residuals, UNetInputs, compute_embedding
from linfusion_cli.unet.resample import Computed, computed_conv_in, fill
from linfusion_cli.unet.walk import encoded

ControlNet = ControlNetModel | ControlNetUnionModel
ReadRows = Callable[[int, int], Tensor]  # (top, bottom) -> rows [1, bottom - top, W, 3] of a picture, 0 to 1
CONTROL_ROWS = 32  # of a control picture, embedded at a time


@dataclass(frozen=True)
class Control:
    """A ControlNet at work: what it finds is taken `scale` times; `kind` says what a union model's picture shows."""

    net: ControlNet
    scale: float
    kind: int | None

    def types(self, batch: int, like: Tensor) -> Tensor:
        """What a union model is told of its pictures: 1 for each kind that is there [B, kinds]."""
        told = like.new_zeros(batch, self.net.config.num_control_type)
        told[:, self.kind] = 1
        return told


@dataclass(frozen=True)
class WholeControlNet(Control):
    """As `Control`, run in one piece with its own attention, after `picture` [1, 3, H, W]."""

    image: Tensor

    def residuals(
        self, latents: Tensor, timestep: Tensor, condition: UNetInputs, dilation: int
    ) -> tuple[list[Tensor], Tensor]:
        """What it adds to the skip connections, and to the middle."""
        image, batch = self.image.expand(len(latents), -1, -1, -1), len(latents)
        more = {"controlnet_cond": image}
        if self.kind is not None:
            more = {"controlnet_cond": [image], "control_type_idx": [self.kind]}
            more |= {"control_type": self.types(batch, latents)}
        more |= {"conditioning_scale": self.scale, "added_cond_kwargs": condition.added, "return_dict": False}
        with dilate(encoder_of(self.net), dilation):
            return self.net(latents, timestep, condition.text, **more)


class EmbeddedImage:
    """The embedding [1, h, w, C] of a control picture, over which nobody writes; all forwards of a phase share it."""

    def __init__(self, embedding: FeatureMap):
        self._map = embedding
        embedding.kept = True

    def wherever(self, storage: Storage) -> FeatureMap:
        """The map. Where it was on the device, and maps now wait on the host since memory ran out, it moves there."""
        if storage.place != "device" and not isinstance(self._map, HostFeatureMap):
            moved, old = storage.new_waiting(*self._map.shape), self._map
            moved.write(0, old.read(0, old.height))
            moved.moments, moved.kept = old.moments, True
            self._map = moved
        return self._map


@dataclass(frozen=True)
class StripControlNet(Control):
    """As `Control`, its attention linear, run in strips after its picture."""

    image: EmbeddedImage

    @property
    def encoder(self) -> nn.Module:
        return encoder_of(self.net)

    def residuals(
        self, run: Strips, latents: Tensor, timestep: Tensor, condition: UNetInputs, before: Residuals | None
    ) -> Residuals:
        """See `forward.Control`."""
        embedding = compute_embedding(self.net, latents, timestep, condition)
        if self.kind is not None:
            embedding = embedding + self._told(len(latents), latents)
        operations = ControlEncoder(self, run, latents, LayerConditioning(embedding, condition.text), before)
        kept, middle = encoded(self.net, operations)
        return Residuals([*kept, middle])

    def _told(self, batch: int, like: Tensor) -> Tensor:
        """The embedding [B, E] of the kind of picture."""
        told = self.net.control_type_proj(self.types(batch, like).flatten()).unflatten(0, (batch, -1))
        return self.net.control_add_embedding(told.flatten(1).to(like.dtype))


class ControlEncoder(EncoderOperations):
    """The Encoding of one forward of a ControlNet: what it keeps is what it adds to the UNet's maps."""

    def __init__(
        self, control: StripControlNet, run: Strips, latents: Tensor, heard: LayerConditioning, before: Residuals | None
    ):
        super().__init__(control.net, run, latents, heard)
        self._control, self._before = control, before
        self._projections = iter(control.net.controlnet_down_blocks)

    def conv_in(self) -> FeatureMap:
        """The latents' first map and the picture's embedding, never stored."""
        net, hint = self._network, self._control.image.wherever(self._run.storage)
        first = computed_conv_in(self._run, net.conv_in, self._latents)
        shift = 0 if self._control.kind is None else union_shift(self._control, hint, first.measured(self._run))

        def rows(top: int, bottom: int) -> Tensor:
            return first.read(top, bottom) + (hint.read(top, bottom) + shift)

        return Computed(first.shape, rows).measured(self._run)

    def keep(self, x: FeatureMap) -> FeatureMap:
        return self._residual(next(self._projections), x)

    def keep_middle(self, x: FeatureMap) -> FeatureMap:
        return self._residual(self._network.controlnet_mid_block, x)

    def _residual(self, projection: nn.Module, x: FeatureMap) -> FeatureMap:
        before = self._before.popleft() if self._before else None

        def rows(top: int, bottom: int) -> Tensor:
            found = as_nhwc(projection(as_nchw(x.read(top, bottom)))) * self._control.scale
            return found if before is None else before.read(top, bottom) + found

        if isinstance(x, Computed):
            return Computed(x.shape, rows)
        target = before or self._run.storage.new_waiting(*x.shape)
        fill(self._run, target, rows, x)
        return target


def union_shift(control: Control, hint: FeatureMap, first: FeatureMap) -> Tensor:
    """What a union model adds to every pixel [B, 1, 1, C], after the means of its picture's map and of the `first`."""
    net = control.net
    image, latents = (of.moments.mean.to(net.task_embedding.dtype) for of in (hint, first))
    image = (image + net.task_embedding[control.kind]).expand(len(latents), -1)
    x = torch.stack([image, latents], dim=1)
    for layer in net.transformer_layes:
        x = layer(x)
    return net.spatial_ch_projs(x[:, 0])[:, None, None]


def encoder_of(net: ControlNet) -> nn.ModuleList:
    """The layers of `net` that see the latents: what a dilation is for."""
    return nn.ModuleList([net.conv_in, net.down_blocks, net.mid_block])


@torch.inference_mode()
def embed_control_image(net: ControlNet, read: ReadRows, height: int, width: int, storage: Storage) -> EmbeddedImage:
    """The picture of `height` x `width` that `read` reads as a ControlNet sees it, in `storage`.

    It is streamed: the convolutions see few rows of the picture at a time. Neither a dilation nor strips change it.
    """
    stages, top = embedding_stages(net), 0
    shrinks = math.prod(stage.shrinks for stage in stages)
    channels = inner(net.controlnet_cond_embedding.conv_out).out_channels
    embedding = storage.new_waiting(1, height // shrinks, width // shrinks, channels)
    result = Writer(embedding)
    for rows in stream(stages, ordered(net, read), height, CONTROL_ROWS):
        result.write(top, rows)
        top += rows.shape[1]
    return EmbeddedImage(result.close(SingleDevice()))


def embedding_stages(net: ControlNet) -> list[StreamStage]:
    """What a picture goes through on its way to the size of the latents."""
    layers = net.controlnet_cond_embedding
    activated = ([Convolution(layer), Pointwise(F.silu)] for layer in (layers.conv_in, *layers.blocks))
    return [*chain.from_iterable(activated), Convolution(layers.conv_out)]


def ordered(net: ControlNet, read: ReadRows) -> ReadRows:
    """`read` with the colours in the order in which `net` expects them."""
    if net.config.controlnet_conditioning_channel_order == "rgb":
        return read
    return lambda top, bottom: read(top, bottom).flip(-1)
