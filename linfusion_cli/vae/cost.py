"""What decoding and encoding will need: the way of `settle` and `streamed`, walked without weights and without maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from linfusion_cli.geometry import Size
from linfusion_cli.strips.cost import Cost, Ledger, Outline
from linfusion_cli.strips.dilation import inner
from linfusion_cli.strips.stream import Add, Convolution, Stage, reach
from linfusion_cli.vae.attention import FixedAttention
from linfusion_cli.vae.sample import Sample
from linfusion_cli.vae.statistics import CORE_LAT, Method, grown, last_normed

WIDE_BYTES = 4  # statistics and what is normalised by them, in fp32
CHANGES, WRITES = 4, 4  # times that each number is read or written on its way into a window, and out of a convolution
KEPT = 8  # the same for a number of a map that is made: written to fresh memory, read, and for its moments
HOLES = 2  # what freed strips of other sizes leave of an operation's memory in a heap: measured on a CPU
SEEN = 5  # strips that attention has at once: normalised, queries, what they saw, and its projections


@dataclass(frozen=True)
class Shape:
    """A batch of maps that a stage takes or makes, `scale` pixels for a latent."""

    batch: int
    height: int
    width: int
    channels: int
    scale: int

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    def strip(self, rows: int) -> int:
        """The numbers in so many rows."""
        return self.batch * min(rows, self.height) * self.width * self.channels

    def after(self, stage: Stage) -> Shape:
        """What `stage` makes of it."""
        height, width, scale = (grown([stage], side) for side in (self.height, self.width, self.scale))
        channels = inner(stage.layer).out_channels if isinstance(stage, Convolution) else self.channels
        return Shape(self.batch, height, width, channels, scale)


def stage_cost(stage: Stage, shape: Shape, rows: int, itemsize: int, keys: int) -> Cost:
    """`stage` over a map, `rows` of it at a time, which are there when it begins."""
    result = shape.after(stage)
    out = result.strip(rows * stage.enlarges // stage.shrinks) * itemsize
    if isinstance(stage, Convolution):
        doubled = stage.enlarges**2
        window = replace(shape, width=shape.width * stage.enlarges).strip(rows * stage.enlarges + stage.kernel - 1)
        wide = 2 * WIDE_BYTES * shape.strip(rows) if stage.before is not None and itemsize < WIDE_BYTES else 0
        passes = CHANGES * shape.pixels * shape.channels * doubled + WRITES * result.pixels * result.channels
        flops = 2 * inner(stage.layer).weight.numel() * result.pixels
        return Cost(flops, passes, window * itemsize + max(out, wide))
    if isinstance(stage, FixedAttention):
        flops = 4 * shape.pixels * shape.channels * (2 * shape.channels + keys)
        return Cost(flops, CHANGES * shape.pixels * shape.channels, SEEN * out)
    shortcut = stage.layer if isinstance(stage, Add) else None
    flops = 2 * inner(shortcut).weight.numel() * shape.pixels if shortcut is not None else 0
    return Cost(flops, WRITES * result.pixels * result.channels, out)


def vae_cost(stages: Sequence[Stage], size: Size, scale: int, channels: int, method: Method, itemsize: int) -> Ledger:
    """Statistics and streaming of a map of `size` px through `stages`, of a VAE on the meta device."""
    return Reckoning(stages, method, itemsize).all(Shape(1, size.height, size.width, channels, scale))


@dataclass
class Reckoning:
    """Walks as `settle` and `streamed` do, on outlines of maps."""

    stages: Sequence[Stage]
    method: Method
    itemsize: int
    ledger: Ledger = field(default_factory=Ledger)

    def all(self, shape: Shape) -> Ledger:
        last, whole = last_normed(self.stages), None
        start = min(self.method.start, last)
        if start:
            shape, whole = self._taken(self.stages[:start], shape, Sample.whole(size_lat(shape)), self.method.place)
        if start < last:
            sample = Sample.spread(size_lat(shape), self.method.patches, CORE_LAT)
            self._taken(self.stages[start:last], shape, sample, "device")
        self._streamed(self.stages[start:], shape)
        del whole  # from which the rest has streamed
        return self.ledger

    def _taken(self, stages: Sequence[Stage], shape: Shape, sample: Sample, where: str) -> tuple[Shape, Outline]:
        """`stages` one after the other over patches, or over the whole -> the last map."""
        patches = patch_shape(stages, shape, sample)
        current, kept = self._outline(patches, where), None  # `kept` is what a shortcut will read, and lives as long
        for i, stage in enumerate(stages):
            if stage.enlarges * stage.shrinks > 1:
                patches = patch_shape(stages[i:], patches, sample)
                current = self._outline(patches, where)
            result = patches.after(stage)
            if not stage.pointwise:
                current.travel()
                kept = current if stage.keeps is not None else kept
                over = stage.keeps is None and (result.width, result.channels) == (patches.width, patches.channels)
                current = current if over else self._outline(result, where)
                current.travel()
            rows = max(1, self.method.height * sample.size.width * patches.scale // (patches.batch * patches.width))
            cost = stage_cost(stage, patches, rows, self.itemsize, self.method.keys)
            scratch = cost.scratch_bytes + WIDE_BYTES * result.strip(rows)  # with what moments are computed from
            passes = cost.passes + KEPT * result.pixels * result.channels
            self.ledger.spend(replace(cost, passes=passes, scratch_bytes=scratch))
            kept = None if isinstance(stage, Add) else kept
            patches = result
        return patches, current

    def _outline(self, shape: Shape, where: str) -> Outline:
        return Outline(self.ledger, (shape.batch, shape.height, shape.width, shape.channels), self.itemsize, where)

    def _streamed(self, stages: Sequence[Stage], shape: Shape) -> None:
        """Beside one operation's memory, what all convolutions carry, and what waits where rows are doubled."""
        height, waiting, kept, costs = self.method.height, 0, 0, []
        for stage in stages:
            if isinstance(stage, Convolution):
                carried = replace(shape, width=shape.width * stage.enlarges, height=stage.kernel - 1)
                waiting += carried.strip(stage.kernel - 1)
                waiting += shape.strip(height) if stage.enlarges > 1 else 0
            if stage.keeps is not None:
                kept = shape.strip(height)
                waiting += shape.strip(3)
            rows = height // stage.enlarges or 1
            cost = stage_cost(stage, shape, rows, self.itemsize, self.method.keys)
            beside = shape.strip(rows) + kept
            costs.append(replace(cost, scratch_bytes=HOLES * (cost.scratch_bytes + beside * self.itemsize)))
            kept = 0 if isinstance(stage, Add) else kept
            shape = shape.after(stage)
        self.ledger.add("device", waiting * self.itemsize)
        for cost in costs:
            self.ledger.spend(cost)
        self.ledger.add("device", -waiting * self.itemsize)


def patch_shape(stages: Sequence[Stage], shape: Shape, sample: Sample) -> Shape:
    """The patches of a map that go into `stages`, with what their cores still need around them."""
    window = sample.window(-(-reach(stages) // shape.scale)).times(shape.scale)
    return Shape(len(sample.corners), window.height, window.width, shape.channels, shape.scale)


def size_lat(shape: Shape) -> Size:
    return Size(shape.width, shape.height).divided(shape.scale)
