"""Estimate the cost of operations in strips, without allocating tensors."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from torch import nn

from linfusion_cli.core.geometry import split_evenly
from linfusion_cli.strips.copies import MAX_DOWNLOADS, MAX_STAGED
from linfusion_cli.strips.dilation import halo_rows, unwrap_convolution
from linfusion_cli.strips.feature_map import MapShape
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.pinned import AddressSpace

WIDE_BYTES = 4  # itemsize of statistics and normalised values, which are fp32
WINDOW_PASSES, RESULT_PASSES = 6, 8  # reads and writes per element: into a window, and out of a convolution

MAX_UPLOADS = 2  # device copies of strips while a host map is read: the current strip and the prefetched one
LOCATIONS = ("device", "host", "computed")


@dataclass(frozen=True)
class Cost:
    """Cost of one operation on one map.

    `flops` counts matrix products and convolutions, two per multiply-add. `passes` is the number of elements read or
    written by all other work. `scratch_bytes` is the peak of temporary memory in the most expensive strip, in
    addition to maps.
    """

    flops: int
    passes: int
    scratch_bytes: int

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both operations run one after the other."""
        scratch = max(self.scratch_bytes, other.scratch_bytes)
        return Cost(self.flops + other.flops, self.passes + other.passes, scratch)


@dataclass(frozen=True)
class ExtraBytes:
    """Device bytes used in addition to an operation's own: of strips it reads, has written, and adds to its result."""

    read_bytes: int = 0
    write_bytes: int = 0
    add_bytes: int = 0


NO_EXTRA_BYTES = ExtraBytes()


@dataclass
class MemoryLedger:
    """Bytes of live maps, their peak, and the peak including the scratch memory of operations.

    The peak of the host is that of pinned memory, including fragmentation.
    """

    live: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOCATIONS, 0))
    spaces: dict[str, AddressSpace] = field(default_factory=lambda: {name: AddressSpace() for name in LOCATIONS[:2]})
    maps_peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOCATIONS, 0))
    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOCATIONS, 0))
    flops: int = 0
    passes: int = 0
    copied_bytes: int = 0  # between host and device
    _staged: deque[int] = field(default_factory=deque, repr=False)

    def stage(self, size: int) -> None:
        """Stage `size` bytes from the CPU in pinned memory, freed once MAX_STAGED later blocks are staged."""
        self._staged.append(self._pin(size))
        if len(self._staged) > MAX_STAGED:
            self.spaces["host"].free(self._staged.popleft())

    def buffer(self, size: int, count: int) -> None:
        """Allocate and free `count` pinned buffers of `size` bytes for rows sent to the CPU."""
        for offset in [self._pin(size) for _ in range(count)]:
            self.spaces["host"].free(offset)

    def close(self) -> None:
        """Free all staged blocks."""
        while self._staged:
            self.spaces["host"].free(self._staged.popleft())

    def _pin(self, size: int) -> int:
        offset = self.spaces["host"].allocate(size)
        assert offset is not None  # the ledger's address spaces are unlimited
        self.peak["host"] = self.spaces["host"].peak
        return offset

    def add(self, where: str, count: int) -> None:
        """Add `count` bytes of maps, negative to remove them, and update the peaks."""
        self.live[where] += count
        self.maps_peak[where] = max(self.maps_peak[where], self.live[where])
        self.peak[where] = self.spaces[where].peak if where == "host" else max(self.peak[where], self.live[where])

    def charge(self, cost: Cost) -> None:
        """Account for an operation that runs while the current maps are alive."""
        self.flops += cost.flops
        self.passes += cost.passes
        self.peak["device"] = max(self.peak["device"], self.live["device"] + cost.scratch_bytes)


class MetaMap(MapShape):
    """A map without data for estimates. It has a shape, and is accounted for in a ledger during its lifetime."""

    def __init__(self, ledger: MemoryLedger, shape: tuple[int, int, int, int], itemsize: int, where: str):
        """Allocate on the "device" or the "host"; "computed" is for maps recomputed on every read."""
        self.shape, self.is_read_only = shape, where == "computed"
        self._ledger, self._where, self._itemsize = ledger, where, itemsize
        self._bytes = 0 if where == "computed" else math.prod(shape) * itemsize
        self._space = ledger.spaces.get(where)
        self._offset = None if self._space is None else self._space.allocate(self._bytes)
        ledger.add(where, self._bytes)

    @property
    def is_computed(self) -> bool:
        """Whether rows are recomputed on every read instead of being stored."""
        return self._where == "computed"

    def transfer(self, times: float = 1) -> None:
        """Account for `times` copies of all rows between host and device, if the map is on the host."""
        if self._where == "host":
            self._ledger.copied_bytes += round(times * self._bytes)

    def read_bytes(self, rows: int) -> int:
        """Return the extra device bytes while strips of `rows` rows are read: the current and the prefetched strip."""
        strips = {"device": 0, "host": MAX_UPLOADS, "computed": 1}[self._where]
        return strips * self._strip_bytes(rows)

    def write_bytes(self, rows: int) -> int:
        """Return the device bytes of computed strips whose download to the host is pending."""
        return MAX_DOWNLOADS * self._strip_bytes(rows) if self._where == "host" else 0

    def _strip_bytes(self, rows: int) -> int:
        batch, height, width, channels = self.shape
        return batch * min(rows, height) * width * channels * self._itemsize

    def release(self) -> None:
        """Mark the map as writable before its last read as a skip connection; computed maps stay read-only."""
        self.is_read_only = self.is_computed

    def __del__(self) -> None:
        if self._space is not None and self._offset is not None:
            self._space.free(self._offset)
        self._ledger.add(self._where, -self._bytes)


def convolution_cost(
    size: StripSize,
    convolution: nn.Module,
    source: tuple[int, int, int],
    itemsize: int,
    dilation: int = 1,
    norm_channels: int | None = None,
    extra: ExtraBytes = NO_EXTRA_BYTES,
) -> Cost:
    """Return the cost of `ops.convolve` over a source of (B, H, W), with normalisation and the addition to the result.

    `norm_channels` is the number of channels normalised at a time, 0 if the source is not normalised; None means all.
    """
    layer = unwrap_convolution(convolution)
    norm_channels = layer.in_channels if norm_channels is None else norm_channels
    batch, height, width = source[0], *(-(-side // layer.stride[0]) for side in source[1:])
    rows = max_strip_rows(size, height, width)
    pixels = batch * rows * layer.stride[0] * source[2]
    window = itemsize * (pixels + 2 * halo_rows(layer, dilation) * batch * source[2]) * layer.in_channels
    result = batch * rows * width * layer.out_channels
    out = itemsize * result  # alive until the next result exists
    reading = out + extra.read_bytes + 2 * WIDE_BYTES * pixels * norm_channels  # normalised and activated
    writing = 2 * out + extra.add_bytes + 2 * WIDE_BYTES * result  # convolved, added, and for moments
    peak = max(reading, writing + extra.read_bytes // MAX_UPLOADS, 2 * out + extra.read_bytes)
    passes = (
        WINDOW_PASSES * math.prod(source) * layer.in_channels
        + RESULT_PASSES * batch * height * width * layer.out_channels
    )
    flops = 2 * layer.weight.numel() * batch * height * width
    return Cost(flops, passes, window + extra.write_bytes + peak)


def max_strip_rows(size: StripSize, height: int, width: int) -> int:
    """Return the height of the tallest strip of a map."""
    return max(bottom - top for top, bottom in split_evenly(height, size.rows_for(width)))
