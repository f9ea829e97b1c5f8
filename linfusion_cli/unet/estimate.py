"""What a forward in strips will need, reckoned by walking the UNet's layers without weights and without maps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from linfusion_cli.strips.copies import STAGED
from linfusion_cli.strips.cost import (
    WIDE_BYTES,
    Cost,
    ExtraBytes,
    MemoryLedger,
    MetaMap,
    convolution_cost,
    max_strip_rows,
)
from linfusion_cli.strips.dilation import inner
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.storage import Place
from linfusion_cli.unet.controlnet import CONTROL_ROWS, ControlNet
from linfusion_cli.unet.resnet import resnet_cost, reusable
from linfusion_cli.unet.transformer import transformer_cost
from linfusion_cli.unet.walk import encoded, walk

COMPUTED = 4  # times that all rows of a map are computed which is not stored: for its moments, and when it is read
SUMMED = 3  # times that a control picture's embedding is read where such a map adds it
ADDED = 6  # times that each number is read or written where one map is added to another, with moments
COLOURS = 3
EMBEDDED = 6  # the same for a number of a control picture's maps, in and out of a convolution, and activated
STREAMED = 6  # strips alive at once of the largest of those: windows, results, activations, and holes they leave


@dataclass(frozen=True)
class Setting:
    """One way to run a forward on `batch` latents of `height` x `width`, in numbers of `itemsize` bytes."""

    size: StripSize
    place: Place
    batch: int
    height: int
    width: int
    itemsize: int
    text_tokens: int = 77
    dilation: int = 1


def estimate_unet(unet: UNet2DConditionModel, setting: Setting, controlnets: Sequence[ControlNet] = ()) -> MemoryLedger:
    """The cost of one forward of `unet` under `controls`, beyond their weights: parameters may be on the meta device.

    With the embeddings of the control pictures, and the memory to make them, but not the work: see `embedding_cost`.
    """
    ledger, residuals = MemoryLedger(), None
    reckonings = [ControlReckoning(net, setting, ledger) for net in controlnets]
    for reckoning in reckonings:
        reckoning.before = residuals
        kept, middle = encoded(reckoning.network, reckoning)
        residuals = deque([*kept, middle])
        del kept, middle
    walk(unet, Reckoning(unet, setting, ledger, residuals))
    ledger.close()
    return ledger


class EncoderReckoning:
    """The Encoding of a forward, on outlines of maps; what is kept is for those to say who know what for."""

    def __init__(self, network: nn.Module, setting: Setting, ledger: MemoryLedger):
        self.network, self.ledger, self._setting = network, ledger, setting

    def conv_in(self) -> MetaMap:
        setting = self._setting
        shape = (setting.batch, setting.height, setting.width)
        self._convolve(self.network.conv_in, shape, times=4)
        return self._computed((*shape, inner(self.network.conv_in).out_channels))

    def resnet(self, block, parts: Sequence[MetaMap]) -> MetaMap:
        shape, setting = parts[0].shape[:3], self._setting
        over = reusable(parts, block.out_channels)
        target = over[0] if over else self._new(*shape, block.out_channels)
        costed = setting.itemsize, setting.dilation
        self.ledger.spend(resnet_cost(setting.size, block, parts, target, bool(over), costed))
        for part in parts:
            part.travel(1 if over else 2)
        target.travel(3)
        if over:
            over[1].travel(2)
        return target

    def transformer(self, transformer, x: MetaMap) -> MetaMap:
        setting = self._setting
        tokens = self._new(*x.shape[:3], transformer.inner_dim)
        cost = transformer_cost(setting.size, transformer, x, tokens, setting.text_tokens, setting.itemsize)
        self.ledger.spend(cost)
        tokens.travel(2 * len(transformer.transformer_blocks))
        x.travel(3)
        return x

    def downsample(self, downsampler, x: MetaMap) -> MetaMap:
        batch, height, width, channels = x.shape
        smaller = self._new(batch, -(-height // 2), -(-width // 2), channels)
        rows = max_strip_rows(self._setting.size, smaller.height, smaller.width)
        beside = ExtraBytes(x.reading(2 * rows), smaller.writing(rows))
        self._convolve(downsampler.conv, x.shape[:3], widest=0, beside=beside)
        x.travel()
        smaller.travel()
        return smaller

    def _new(self, *shape: int) -> MetaMap:
        return self._outline(shape, "host" if self._setting.place == "host" else "device")

    def _waiting(self, *shape: int) -> MetaMap:
        """A map that waits where skip connections do."""
        return self._outline(shape, "device" if self._setting.place == "device" else "host")

    def _computed(self, shape: tuple[int, ...]) -> MetaMap:
        return self._outline(shape, "nowhere")

    def _outline(self, shape: tuple[int, ...], where: str) -> MetaMap:
        return MetaMap(self.ledger, shape, self._setting.itemsize, where)

    def _convolve(self, convolution, shape: tuple[int, int, int], times: int = 1, **how: Any) -> None:
        setting = self._setting
        cost = convolution_cost(setting.size, convolution, shape, setting.itemsize, setting.dilation, **how)
        for _ in range(times):
            self.ledger.spend(cost)


class ControlReckoning(EncoderReckoning):
    """The Encoding of a ControlNet's forward; `before` is what others add to the UNet's maps already."""

    before: deque[MetaMap] | None = None

    def __init__(self, net: ControlNet, setting: Setting, ledger: MemoryLedger):
        super().__init__(net, setting, ledger)
        self._projections = iter(net.controlnet_down_blocks)
        self.embedding = self._waiting(1, setting.height, setting.width, inner(net.conv_in).out_channels)
        making = embedding_cost(net, setting.height, setting.width, setting.itemsize)
        scale = image_scale(net)
        for _ in range(STAGED + 1):
            ledger.stage(CONTROL_ROWS * setting.width * scale * COLOURS * setting.itemsize)
        ledger.spend(replace(making, flops=0, passes=0))

    def conv_in(self) -> MetaMap:
        self.embedding.travel(SUMMED)
        return super().conv_in()

    def keep(self, x: MetaMap) -> MetaMap:
        return self._residual(next(self._projections), x)

    def keep_middle(self, x: MetaMap) -> MetaMap:
        return self._residual(self.network.controlnet_mid_block, x)

    def _residual(self, projection: nn.Module, x: MetaMap) -> MetaMap:
        before = self.before.popleft() if self.before else None
        if x.is_computed:  # whenever the UNet's first skip connection is read
            self.embedding.travel(SUMMED)
            self._convolve(self.network.conv_in, x.shape[:3], COMPUTED)
            self._convolve(projection, x.shape[:3], COMPUTED)
            return self._computed(x.shape)
        target = before or self._waiting(*x.shape)
        self._convolve(projection, x.shape[:3])
        x.travel()
        target.travel(2 if before else 1)
        return target


class Reckoning(EncoderReckoning):
    """The Operations of a UNet's forward, to whose maps `residuals` are added."""

    def __init__(
        self, unet: UNet2DConditionModel, setting: Setting, ledger: MemoryLedger, residuals: deque[MetaMap] | None
    ):
        super().__init__(unet, setting, ledger)
        self._residuals = residuals
        self._copied: MetaMap | None = None

    def keep(self, x: MetaMap) -> MetaMap:
        if self._residuals is not None:
            return self._added(x, self._residuals.popleft())
        if not x.kept and self._setting.place == "skips":
            self._copied = None  # its copy has arrived
            copy = self._waiting(*x.shape)
            copy.travel()
            self._copied = x  # which stays until the next one is copied
            return copy
        x.kept = True
        return x

    def keep_middle(self, x: MetaMap) -> MetaMap:
        return x if self._residuals is None else self._added(x, self._residuals.popleft())

    def upsample(self, upsampler, x: MetaMap, like: MetaMap, parts: int) -> list[MetaMap]:
        shape = (x.shape[0], like.height, like.width)
        larger = [self._new(*shape, upsampler.out_channels // parts) for _ in range(parts)]
        rows = max_strip_rows(self._setting.size, like.height, like.width)
        repeated = math.prod(shape[::2]) * rows * x.channels * self._setting.itemsize * 3 // 2
        beside = ExtraBytes(x.reading(rows // 2 + 1) + repeated, sum(each.writing(rows) for each in larger))
        self._convolve(upsampler.conv, shape, widest=0, beside=beside)
        for outline in (x, *larger):
            outline.travel()
        return larger

    def take(self, skip: MetaMap) -> MetaMap:
        self._copied = None
        skip.release()
        return skip

    def conv_out(self, x: MetaMap) -> None:
        rows = max_strip_rows(self._setting.size, x.height, x.width)
        self._convolve(self.network.conv_out, x.shape[:3], beside=ExtraBytes(x.reading(rows)))
        x.travel()

    def _added(self, x: MetaMap, residual: MetaMap) -> MetaMap:
        numbers = math.prod(x.shape)
        strip = numbers * min(x.height, self._setting.size.rows_of(x.width)) // x.height
        if x.is_computed:
            self.ledger.spend(Cost(0, ADDED * COMPUTED * numbers, 0))
            return self._computed(x.shape)
        self.ledger.spend(Cost(0, ADDED * numbers, (2 * self._setting.itemsize + WIDE_BYTES) * strip))
        x.travel()
        residual.travel(2)
        return residual


def image_scale(net: ControlNet) -> int:
    """How many pixels of a control picture there are for a latent, along a side."""
    return math.prod(inner(layer).stride[0] for layer in net.controlnet_cond_embedding.blocks)


def embedding_cost(net: ControlNet, height: int, width: int, itemsize: int) -> Cost:
    """`control.embedded_picture` for latents of `height` x `width`, beside the map that it makes."""
    layers = net.controlnet_cond_embedding
    convolutions = [inner(layer) for layer in (layers.conv_in, *layers.blocks, layers.conv_out)]
    scale = image_scale(net)
    flops, passes, widest, rows = 0, 0, 0, CONTROL_ROWS
    pixels, across = height * width * scale**2, width * scale
    for layer in convolutions:
        stride = layer.stride[0]
        pixels, across, rows = pixels // stride**2, across // stride, rows // stride
        flops += 2 * layer.weight.numel() * pixels
        passes += EMBEDDED * layer.out_channels * pixels
        widest = max(widest, rows * across * layer.out_channels)
    return Cost(flops, passes, STREAMED * widest * itemsize)


def whole_bytes(nets: Sequence[ControlNet], setting: Setting) -> int:
    """What `control.WholeControl` takes beyond a forward in one strip: at first a map of the picture's size, twice.

    Later what has been found is there three times: of this ControlNet, of those before, or added to the UNet's maps.
    """
    largest = 0
    for net in nets:
        kept, middle = encoded(net, ControlReckoning(net, setting, MemoryLedger()))
        found = sum(math.prod(outline.shape) for outline in (*kept, middle))
        area = setting.batch * setting.height * setting.width * image_scale(net) ** 2
        largest = max(largest, 2 * found, 2 * inner(net.controlnet_cond_embedding.conv_in).out_channels * area)
    return largest * setting.itemsize
