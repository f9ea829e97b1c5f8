"""What an operation in strips costs, and the sum of it over a network: reckoned, without a tensor."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from torch import nn

from linfusion_cli.core.geometry import split_evenly
from linfusion_cli.strips.copies import DOWNLOADS, STAGED
from linfusion_cli.strips.dilation import halo_rows, inner
from linfusion_cli.strips.feature_map import MapShape
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.pinned import AddressSpace

WIDE_BYTES = 4  # statistics and what is normalised by them, in fp32
CHANGES, WRITES = 6, 8  # times that each number is read or written on its way into a window, and out of a convolution

UPLOADS = 2  # strips of a map on the host that are on the device while it is read: those in use, those that follow
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


@dataclass(frozen=True)
class ExtraBytes:
    """Bytes on the device beside an operation's own: of strips that it reads, that it has written, and that it adds."""

    reading: int = 0
    writing: int = 0
    adding: int = 0


NO_EXTRA_BYTES = ExtraBytes()


@dataclass
class MemoryLedger:
    """The bytes of maps that are alive, the most there ever were, and the most together with an operation's scratch.

    On the host the peak is that of pinned memory, with the holes between maps.
    """

    live: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WHERE, 0))
    spaces: dict[str, AddressSpace] = field(default_factory=lambda: {name: AddressSpace() for name in WHERE[:2]})
    maps_peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WHERE, 0))
    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WHERE, 0))
    flops: int = 0
    passes: int = 0
    copied_bytes: int = 0  # between host and device
    _staged: deque[int] = field(default_factory=deque, repr=False)

    def stage(self, size: int) -> None:
        """So many bytes pass from the CPU through pinned memory, which is free again after some others have."""
        self._staged.append(self._pin(size))
        if len(self._staged) > STAGED:
            self.spaces["host"].free(self._staged.popleft())

    def buffer(self, size: int, count: int) -> None:
        """Rows pass to the CPU through `count` buffers of pinned memory, while what waits there now does."""
        for offset in [self._pin(size) for _ in range(count)]:
            self.spaces["host"].free(offset)

    def close(self) -> None:
        """Nothing passes any more."""
        while self._staged:
            self.spaces["host"].free(self._staged.popleft())

    def _pin(self, size: int) -> int:
        offset = self.spaces["host"].allocate(size)
        self.peak["host"] = self.spaces["host"].peak
        return offset

    def add(self, where: str, count: int) -> None:
        self.live[where] += count
        self.maps_peak[where] = max(self.maps_peak[where], self.live[where])
        self.peak[where] = self.spaces[where].peak if where == "host" else max(self.peak[where], self.live[where])

    def spend(self, cost: Cost) -> None:
        """An operation runs while the maps alive now are."""
        self.flops += cost.flops
        self.passes += cost.passes
        self.peak["device"] = max(self.peak["device"], self.live["device"] + cost.scratch_bytes)


class MetaMap(MapShape):
    """A map that is only reckoned with: its shape, and its bytes in a ledger for as long as it lives."""

    def __init__(self, ledger: MemoryLedger, shape: tuple[int, int, int, int], itemsize: int, where: str):
        """`where` is "device" or "host", or "nowhere" for a map whose rows are computed when they are read."""
        self.shape, self.kept = shape, where == "nowhere"
        self._ledger, self._where, self._itemsize = ledger, where, itemsize
        self._bytes = 0 if where == "nowhere" else math.prod(shape) * itemsize
        self._space = ledger.spaces.get(where)
        self._offset = None if self._space is None else self._space.allocate(self._bytes)
        ledger.add(where, self._bytes)

    @property
    def is_computed(self) -> bool:
        """Whether its rows are computed when they are read, and stored nowhere."""
        return self._where == "nowhere"

    def travel(self, times: float = 1) -> None:
        """Its rows are read or written so many times, and pass between host and device if it waits there."""
        if self._where == "host":
            self._ledger.copied_bytes += round(times * self._bytes)

    def reading(self, rows: int) -> int:
        """Bytes on the device beside the map while strips of so many rows are read: in use, and under way."""
        strips = {"device": 0, "host": UPLOADS, "nowhere": 1}[self._where]
        return strips * self._strip(rows)

    def writing(self, rows: int) -> int:
        """Bytes on the device of strips that were computed and are on their way to the host."""
        return DOWNLOADS * self._strip(rows) if self._where == "host" else 0

    def _strip(self, rows: int) -> int:
        batch, height, width, channels = self.shape
        return batch * min(rows, height) * width * channels * self._itemsize

    def release(self) -> None:
        """The skip connection is about to be read for the last time; what is nowhere cannot be written over."""
        self.kept = self.is_computed

    def __del__(self) -> None:
        if self._space is not None:
            self._space.free(self._offset)
        self._ledger.add(self._where, -self._bytes)


def convolution_cost(
    size: StripSize,
    convolution: nn.Module,
    source: tuple[int, int, int],
    itemsize: int,
    dilation: int = 1,
    widest: int | None = None,
    beside: ExtraBytes = NO_EXTRA_BYTES,
) -> Cost:
    """`ops.convolved` over a source of (B, H, W), changed on the way in and added to on the way out.

    `widest` is the number of channels that are normalised at a time, 0 if the source is not normalised.
    """
    layer = inner(convolution)
    widest = layer.in_channels if widest is None else widest
    batch, height, width = source[0], *(-(-side // layer.stride[0]) for side in source[1:])
    rows = max_strip_rows(size, height, width)
    pixels = batch * rows * layer.stride[0] * source[2]
    window = itemsize * (pixels + 2 * halo_rows(layer, dilation) * batch * source[2]) * layer.in_channels
    result = batch * rows * width * layer.out_channels
    out = itemsize * result  # it is alive until the next is there
    reading = out + beside.reading + 2 * WIDE_BYTES * pixels * widest  # normalised, and activated
    writing = 2 * out + beside.adding + 2 * WIDE_BYTES * result  # convolved, added to, and for its moments
    scratch = window + beside.writing + max(reading, writing + beside.reading // UPLOADS, 2 * out + beside.reading)
    passes = CHANGES * math.prod(source) * layer.in_channels + WRITES * batch * height * width * layer.out_channels
    flops = 2 * layer.weight.numel() * batch * height * width
    return Cost(flops, passes, scratch)


def max_strip_rows(size: StripSize, height: int, width: int) -> int:
    """The rows of the tallest strip of a map."""
    return max(bottom - top for top, bottom in split_evenly(height, size.rows_of(width)))
