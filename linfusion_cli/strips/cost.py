"""What an operation in strips costs, and the sum of it over a network: reckoned, without a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

from linfusion_cli.strips.dilation import halo_rows, inner
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.storage import Shaped

WIDE_BYTES = 4  # statistics and what is normalised by them, in fp32
CHANGES, WRITES = 6, 8  # times that each number is read or written on its way into a window, and out of a convolution

WHERE = ("device", "host", "nowhere")


@dataclass(frozen=True)
class Cost:
    """One operation on one map.

    `flops` are those of matrix products and convolutions, two for each multiplication; `passes` is how many numbers
    all the rest reads or writes; `scratch_bytes` what is alive at once beside maps, in its most expensive strip.
    """

    flops: int
    passes: int
    scratch_bytes: int

    def __add__(self, other: Cost) -> Cost:
        """One operation after the other."""
        scratch = max(self.scratch_bytes, other.scratch_bytes)
        return Cost(self.flops + other.flops, self.passes + other.passes, scratch)


@dataclass
class Ledger:
    """The bytes of maps that are alive, the most there ever were, and the most together with an operation's scratch."""

    live: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WHERE, 0))
    maps_peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WHERE, 0))
    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WHERE, 0))
    flops: int = 0
    passes: int = 0
    copied_bytes: int = 0  # between host and device

    def add(self, where: str, count: int) -> None:
        self.live[where] += count
        self.maps_peak[where] = max(self.maps_peak[where], self.live[where])
        self.peak[where] = max(self.peak[where], self.live[where])

    def spend(self, cost: Cost) -> None:
        """An operation runs while the maps alive now are."""
        self.flops += cost.flops
        self.passes += cost.passes
        self.peak["device"] = max(self.peak["device"], self.live["device"] + cost.scratch_bytes)


class Outline(Shaped):
    """A map that is only reckoned with: its shape, and its bytes in a ledger for as long as it lives."""

    def __init__(self, ledger: Ledger, shape: tuple[int, int, int, int], itemsize: int, where: str):
        """`where` is "device" or "host", or "nowhere" for a map whose rows are computed when they are read."""
        self.shape, self.kept = shape, where == "nowhere"
        self._ledger, self._where = ledger, where
        self._bytes = 0 if where == "nowhere" else math.prod(shape) * itemsize
        if where == "host":
            self._bytes = 1 << (self._bytes - 1).bit_length()  # torch pins powers of two
        ledger.add(where, self._bytes)

    @property
    def is_computed(self) -> bool:
        """Whether its rows are computed when they are read, and stored nowhere."""
        return self._where == "nowhere"

    def travel(self, times: int = 1) -> None:
        """Its rows are read or written so many times, and pass between host and device if it waits there."""
        if self._where == "host":
            self._ledger.copied_bytes += times * self._bytes

    def release(self) -> None:
        """The skip connection is about to be read for the last time; what is nowhere cannot be written over."""
        self.kept = self.is_computed

    def __del__(self) -> None:
        self._ledger.add(self._where, -self._bytes)


def convolution_cost(
    size: StripSize, convolution: nn.Module, source: tuple[int, int, int], itemsize: int, dilation: int = 1
) -> Cost:
    """`ops.convolved` over a source of (B, H, W), changed on the way in and added to on the way out."""
    layer = inner(convolution)
    batch, height, width = source[0], *(-(-side // layer.stride[0]) for side in source[1:])
    rows = min(height, size.rows_of(width))
    read = batch * rows * layer.stride[0] * source[2] * layer.in_channels
    window = read + 2 * halo_rows(layer, dilation) * batch * source[2] * layer.in_channels
    result = batch * rows * width * layer.out_channels
    reading = 2 * WIDE_BYTES * read  # normalised, and activated
    writing = 2 * itemsize * result + 2 * WIDE_BYTES * result  # convolved, added to, and for its moments
    passes = CHANGES * math.prod(source) * layer.in_channels + WRITES * batch * height * width * layer.out_channels
    flops = 2 * layer.weight.numel() * batch * height * width
    return Cost(flops, passes, itemsize * window + max(reading, writing))
