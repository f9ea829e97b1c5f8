"""What a forward in strips will need, reckoned by walking the UNet's layers without weights and without maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from linfusion_cli.strips.cost import Ledger, Outline, convolution_cost
from linfusion_cli.strips.dilation import inner
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.storage import Place
from linfusion_cli.unet.resnet import resnet_cost, reusable
from linfusion_cli.unet.transformer import transformer_cost
from linfusion_cli.unet.walk import walk


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


def reckon(unet: UNet2DConditionModel, setting: Setting) -> Ledger:
    """The cost of one forward of `unet`, whose parameters may be on the meta device, beyond its weights."""
    reckoning = Reckoning(unet, setting)
    walk(unet, reckoning)
    return reckoning.ledger


class Reckoning:
    """The Operations of a forward, on outlines of maps."""

    def __init__(self, unet: UNet2DConditionModel, setting: Setting):
        self._unet, self._setting = unet, setting
        self.ledger = Ledger()

    def conv_in(self) -> Outline:
        setting = self._setting
        shape = (setting.batch, setting.height, setting.width)
        self._convolve(self._unet.conv_in, shape, times=4)
        return Outline(self.ledger, (*shape, inner(self._unet.conv_in).out_channels), setting.itemsize, "nowhere")

    def resnet(self, block, parts: Sequence[Outline]) -> Outline:
        shape, setting = parts[0].shape[:3], self._setting
        over = reusable(parts, block.out_channels)
        target = over[0] if over else self._new(*shape, block.out_channels)
        self.ledger.spend(resnet_cost(setting.size, block, shape, setting.itemsize, setting.dilation))
        for part in parts:
            part.travel(1 if over else 2)
        target.travel(3)
        return target

    def transformer(self, transformer, x: Outline) -> Outline:
        setting = self._setting
        tokens = self._new(*x.shape[:3], transformer.inner_dim)
        cost = transformer_cost(setting.size, transformer, x.shape[:3], setting.text_tokens, setting.itemsize)
        self.ledger.spend(cost)
        tokens.travel(2 * len(transformer.transformer_blocks))
        x.travel(3)
        return x

    def downsample(self, downsampler, x: Outline) -> Outline:
        batch, height, width, channels = x.shape
        smaller = self._new(batch, -(-height // 2), -(-width // 2), channels)
        self._convolve(downsampler.conv, x.shape[:3])
        x.travel()
        smaller.travel()
        return smaller

    def upsample(self, upsampler, x: Outline, like: Outline, parts: int) -> list[Outline]:
        shape = (x.shape[0], like.height, like.width)
        larger = [self._new(*shape, upsampler.out_channels // parts) for _ in range(parts)]
        self._convolve(upsampler.conv, shape)
        for outline in (x, *larger):
            outline.travel()
        return larger

    def keep(self, x: Outline) -> Outline:
        if not x.kept and self._setting.place == "skips":
            copy = Outline(self.ledger, x.shape, self._setting.itemsize, "host")
            copy.travel()
            return copy
        x.kept = True
        return x

    def take(self, skip: Outline) -> Outline:
        skip.release()
        return skip

    def add_residual(self, skip: Outline, index: int, x: Outline) -> Outline:
        return skip

    def add_mid_residual(self, x: Outline) -> Outline:
        return x

    def conv_out(self, x: Outline) -> None:
        self._convolve(self._unet.conv_out, x.shape[:3])

    def _new(self, batch: int, height: int, width: int, channels: int) -> Outline:
        where = "host" if self._setting.place == "host" else "device"
        return Outline(self.ledger, (batch, height, width, channels), self._setting.itemsize, where)

    def _convolve(self, convolution, shape: tuple[int, int, int], times: int = 1) -> None:
        setting = self._setting
        for _ in range(times):
            self.ledger.spend(convolution_cost(setting.size, convolution, shape, setting.itemsize, setting.dilation))
