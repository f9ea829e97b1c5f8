"""Estimate the memory and work of a forward in strips by walking the UNet's layers, without weights or maps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from diffusers import UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from linfusion_cli.strips.copies import MAX_STAGED
from linfusion_cli.strips.cost import (
    WIDE_BYTES,
    Cost,
    ExtraBytes,
    MemoryLedger,
    MetaMap,
    convolution_cost,
    max_strip_rows,
)
from linfusion_cli.strips.dilation import unwrap_convolution
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.storage import Place
from linfusion_cli.unet.controlnet import CONTROL_ROWS, ControlNet
from linfusion_cli.unet.resnet import find_reusable, resnet_cost
from linfusion_cli.unet.transformer import transformer_cost
from linfusion_cli.unet.walk import walk_encoder, walk_unet

COMPUTED_READS = 4  # times that a computed map is evaluated: for its moments, and when it is read
EMBEDDING_READS = 3  # times that the control image's embedding is read by such a map
ADD_PASSES = 6  # reads and writes per element for adding a map to another, with moments
COLOUR_CHANNELS = 3
EMBEDDING_PASSES = 6  # reads and writes per element of a control image's maps: convolution and activation
STREAM_STRIPS = 6  # live strips of the largest of these maps: windows, results, activations and fragmentation


@dataclass(frozen=True)
class ForwardSettings:
    """Settings of a forward on `batch` latents of `height` x `width`, with elements of `itemsize` bytes."""

    size: StripSize
    place: Place
    batch: int
    height: int
    width: int
    itemsize: int
    text_tokens: int = 77
    dilation: int = 1


def estimate_unet(
    unet: UNet2DConditionModel, settings: ForwardSettings, controlnets: Sequence[ControlNet] = ()
) -> MemoryLedger:
    """Return the cost of one forward of `unet` with `controlnets`, without their weights. Meta parameters suffice.

    It includes the embeddings of the control images and the memory to compute them, but not the work: see
    `embedding_cost`.
    """
    ledger, residuals = MemoryLedger(), None
    estimators = [ControlNetEstimator(net, settings, ledger) for net in controlnets]
    for estimator in estimators:
        estimator.previous = residuals
        skips, middle = walk_encoder(estimator.network, estimator)
        residuals = deque([*skips, middle])
        del skips, middle
    walk_unet(unet, UNetEstimator(unet, settings, ledger, residuals))
    ledger.close()
    return ledger


class EncoderEstimator:
    """Estimates the encoder's operations in one forward. Subclasses define the handling of skip connections."""

    def __init__(self, network: UNet2DConditionModel | ControlNet, settings: ForwardSettings, ledger: MemoryLedger):
        self.network, self.ledger, self._settings = network, ledger, settings

    def conv_in(self) -> MetaMap:
        """Charge the input convolution, whose result is computed on every read."""
        settings = self._settings
        shape = (settings.batch, settings.height, settings.width)
        self._convolve(self.network.conv_in, shape, times=4)
        return self._new_computed((*shape, unwrap_convolution(self.network.conv_in).out_channels))

    def resnet(self, block: ResnetBlock2D, parts: Sequence[MetaMap]) -> MetaMap:
        """Charge a ResNet block."""
        shape, settings = parts[0].shape[:3], self._settings
        reusable = find_reusable(parts, block.out_channels)
        target = reusable[0] if reusable else self._new(*shape, block.out_channels)
        precision = settings.itemsize, settings.dilation
        self.ledger.charge(resnet_cost(settings.size, block, parts, target, bool(reusable), *precision))
        for part in parts:
            part.transfer(1 if reusable else 2)
        target.transfer(3)
        if reusable:
            reusable[1].transfer(2)
        return target

    def transformer(self, transformer: Transformer2DModel, x: MetaMap) -> MetaMap:
        """Charge a transformer, which works in place."""
        settings = self._settings
        tokens = self._new(*x.shape[:3], transformer.inner_dim)
        cost = transformer_cost(settings.size, transformer, x, tokens, settings.text_tokens, settings.itemsize)
        self.ledger.charge(cost)
        tokens.transfer(2 * len(transformer.transformer_blocks))
        x.transfer(3)
        return x

    def downsample(self, downsampler: Downsample2D, x: MetaMap) -> MetaMap:
        """Charge a downsampler."""
        batch, height, width, channels = x.shape
        smaller = self._new(batch, -(-height // 2), -(-width // 2), channels)
        rows = max_strip_rows(self._settings.size, smaller.height, smaller.width)
        extra = ExtraBytes(x.read_bytes(2 * rows), smaller.write_bytes(rows))
        self._convolve(downsampler.conv, x.shape[:3], norm_channels=0, extra=extra)
        x.transfer()
        smaller.transfer()
        return smaller

    def _new(self, batch: int, height: int, width: int, channels: int) -> MetaMap:
        return self._create_map(
            (batch, height, width, channels), "host" if self._settings.place == "host" else "device"
        )

    def _new_skip(self, batch: int, height: int, width: int, channels: int) -> MetaMap:
        """Return a map with the placement of skip connections."""
        where = "device" if self._settings.place == "device" else "host"
        return self._create_map((batch, height, width, channels), where)

    def _new_computed(self, shape: tuple[int, int, int, int]) -> MetaMap:
        return self._create_map(shape, "computed")

    def _create_map(self, shape: tuple[int, int, int, int], where: str) -> MetaMap:
        return MetaMap(self.ledger, shape, self._settings.itemsize, where)

    def _convolve(self, convolution: nn.Module, shape: tuple[int, int, int], times: int = 1, **options: Any) -> None:
        settings = self._settings
        cost = convolution_cost(settings.size, convolution, shape, settings.itemsize, settings.dilation, **options)
        for _ in range(times):
            self.ledger.charge(cost)


class ControlNetEstimator(EncoderEstimator):
    """Estimates a ControlNet's forward. `previous` are the residuals of other ControlNets."""

    previous: deque[MetaMap] | None = None

    def __init__(self, net: ControlNet, settings: ForwardSettings, ledger: MemoryLedger):
        super().__init__(net, settings, ledger)
        self._projections = iter(net.controlnet_down_blocks)
        self.embedding = self._new_skip(
            1, settings.height, settings.width, unwrap_convolution(net.conv_in).out_channels
        )
        cost = embedding_cost(net, settings.height, settings.width, settings.itemsize)
        scale = image_scale(net)
        for _ in range(MAX_STAGED + 1):
            ledger.stage(CONTROL_ROWS * settings.width * scale * COLOUR_CHANNELS * settings.itemsize)
        ledger.charge(replace(cost, flops=0, passes=0))

    def conv_in(self) -> MetaMap:
        """Charge the input convolution and the reads of the control image's embedding."""
        self.embedding.transfer(EMBEDDING_READS)
        return super().conv_in()

    def store_skip(self, x: MetaMap) -> MetaMap:
        """Charge the projection of a skip connection and return its residual."""
        return self._project_residual(next(self._projections), x)

    def finish_middle(self, x: MetaMap) -> MetaMap:
        """Charge the projection of the middle's result and return its residual."""
        return self._project_residual(self.network.controlnet_mid_block, x)

    def _project_residual(self, projection: nn.Module, x: MetaMap) -> MetaMap:
        previous = self.previous.popleft() if self.previous else None
        if x.is_computed:  # charged here for all reads of the UNet's first skip connection
            self.embedding.transfer(EMBEDDING_READS)
            self._convolve(self.network.conv_in, x.shape[:3], COMPUTED_READS)
            self._convolve(projection, x.shape[:3], COMPUTED_READS)
            return self._new_computed(x.shape)
        target = previous or self._new_skip(*x.shape)
        self._convolve(projection, x.shape[:3])
        x.transfer()
        target.transfer(2 if previous else 1)
        return target


class UNetEstimator(EncoderEstimator):
    """Estimates a UNet's forward, with `residuals` added to its maps."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        settings: ForwardSettings,
        ledger: MemoryLedger,
        residuals: deque[MetaMap] | None,
    ):
        super().__init__(unet, settings, ledger)
        self._residuals = residuals
        self._copied: MetaMap | None = None

    def store_skip(self, x: MetaMap) -> MetaMap:
        """Charge the copy of a skip connection, or the addition of its residual."""
        if self._residuals is not None:
            return self._add_residual(x, self._residuals.popleft())
        if not x.is_read_only and self._settings.place == "skips":
            self._copied = None  # its copy is complete
            copy = self._new_skip(*x.shape)
            copy.transfer()
            self._copied = x  # alive until the next map is copied
            return copy
        x.is_read_only = True
        return x

    def finish_middle(self, x: MetaMap) -> MetaMap:
        """Charge the addition of the middle's residual."""
        return x if self._residuals is None else self._add_residual(x, self._residuals.popleft())

    def upsample(self, upsampler: Upsample2D, x: MetaMap, like: MetaMap, parts: int) -> list[MetaMap]:
        """Charge an upsampler."""
        shape = (x.shape[0], like.height, like.width)
        larger = [self._new(*shape, upsampler.out_channels // parts) for _ in range(parts)]
        rows = max_strip_rows(self._settings.size, like.height, like.width)
        repeated = math.prod(shape[::2]) * rows * x.channels * self._settings.itemsize * 3 // 2
        extra = ExtraBytes(x.read_bytes(rows // 2 + 1) + repeated, sum(each.write_bytes(rows) for each in larger))
        self._convolve(cast(nn.Module, upsampler.conv), shape, norm_channels=0, extra=extra)
        for each in (x, *larger):
            each.transfer()
        return larger

    def load_skip(self, skip: MetaMap) -> MetaMap:
        """Release a skip connection for its last read."""
        self._copied = None
        skip.release()
        return skip

    def conv_out(self, x: MetaMap) -> None:
        """Charge the output convolution."""
        rows = max_strip_rows(self._settings.size, x.height, x.width)
        self._convolve(self.network.conv_out, x.shape[:3], extra=ExtraBytes(x.read_bytes(rows)))
        x.transfer()

    def _add_residual(self, x: MetaMap, residual: MetaMap) -> MetaMap:
        elements = math.prod(x.shape)
        strip = elements * min(x.height, self._settings.size.rows_for(x.width)) // x.height
        if x.is_computed:
            self.ledger.charge(Cost(0, ADD_PASSES * COMPUTED_READS * elements, 0))
            return self._new_computed(x.shape)
        self.ledger.charge(Cost(0, ADD_PASSES * elements, (2 * self._settings.itemsize + WIDE_BYTES) * strip))
        x.transfer()
        residual.transfer(2)
        return residual


def image_scale(net: ControlNet) -> int:
    """Return the number of control image pixels per latent, along one side."""
    return math.prod(unwrap_convolution(layer).stride[0] for layer in net.controlnet_cond_embedding.blocks)


def embedding_cost(net: ControlNet, height: int, width: int, itemsize: int) -> Cost:
    """Return the cost of `controlnet.embed_control_image` for latents of `height` x `width`, without the result."""
    layers = net.controlnet_cond_embedding
    convolutions = [unwrap_convolution(layer) for layer in (layers.conv_in, *layers.blocks, layers.conv_out)]
    scale = image_scale(net)
    flops, passes, widest, rows = 0, 0, 0, CONTROL_ROWS
    pixels, across = height * width * scale**2, width * scale
    for layer in convolutions:
        stride = layer.stride[0]
        pixels, across, rows = pixels // stride**2, across // stride, rows // stride
        flops += 2 * layer.weight.numel() * pixels
        passes += EMBEDDING_PASSES * layer.out_channels * pixels
        widest = max(widest, rows * across * layer.out_channels)
    return Cost(flops, passes, STREAM_STRIPS * widest * itemsize)


def whole_controlnet_bytes(nets: Sequence[ControlNet], settings: ForwardSettings) -> int:
    """Return the memory of `controlnet.WholeControlNet` in excess of a forward in one strip.

    First, this is a map of the image's size, twice. Later, the residuals exist three times: of this ControlNet, of the
    previous ones, and added to the UNet's maps.
    """
    largest = 0
    for net in nets:
        skips, middle = walk_encoder(net, ControlNetEstimator(net, settings, MemoryLedger()))
        residuals = sum(math.prod(each.shape) for each in (*skips, middle))
        area = settings.batch * settings.height * settings.width * image_scale(net) ** 2
        largest = max(
            largest, 2 * residuals, 2 * unwrap_convolution(net.controlnet_cond_embedding.conv_in).out_channels * area
        )
    return largest * settings.itemsize
