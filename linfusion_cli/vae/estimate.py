"""What decoding and encoding will need: the way of `settle` and `streamed`, walked without weights and without maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from linfusion_cli.core.geometry import Size
from linfusion_cli.strips.copies import STAGED
from linfusion_cli.strips.cost import UPLOADS, Cost, MemoryLedger, MetaMap
from linfusion_cli.strips.dilation import inner
from linfusion_cli.strips.stream import Add, Convolution, StreamStage, reach
from linfusion_cli.vae.attention import FixedAttention
from linfusion_cli.vae.patches import READ_ROWS
from linfusion_cli.vae.sample import Sample, grid
from linfusion_cli.vae.statistics import CORE_LAT, VaeStrategy, last_normed, max_output_rows, output_length

WIDE_BYTES = 4  # statistics and what is normalised by them, in fp32
FINISHED_BYTES = 13  # of a number of the image that leaves the device: in fp32, on its way, and while it is checked
LATENT_BYTES = 4  # of each latent that is decoded, all of which are on the device
INDEX_BYTES = 3 * 8  # of the place of a pixel that attention looks at
MOMENTS = 2 * WIDE_BYTES  # of a number from which moments are computed: itself, and its distance from the mean
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

    def after(self, stage: StreamStage) -> Shape:
        """What `stage` makes of it."""
        height, width, scale = (output_length([stage], side) for side in (self.height, self.width, self.scale))
        channels = inner(stage.layer).out_channels if isinstance(stage, Convolution) else self.channels
        return Shape(self.batch, height, width, channels, scale)


@dataclass(frozen=True)
class StageCost:
    """A stage over a map: its work, the bytes of its window, which serves all stages, and of what else it makes."""

    flops: int
    passes: int
    window: int = 0
    made: int = 0

    def spent(self, more_passes: int, scratch: int) -> Cost:
        return Cost(self.flops, self.passes + more_passes, scratch)


def stage_cost(stage: StreamStage, shape: Shape, rows: int, itemsize: int, keys: int) -> StageCost:
    """`stage` over a map, `rows` of it at a time, which are there when it begins."""
    result = shape.after(stage)
    out = result.strip(rows * stage.enlarges // stage.shrinks) * itemsize
    if isinstance(stage, Convolution):
        doubled = stage.enlarges**2
        window = replace(shape, width=shape.width * stage.enlarges).strip(rows * stage.enlarges + stage.kernel - 1)
        wide = WIDE_BYTES * shape.strip(rows) if stage.before is not None and itemsize < WIDE_BYTES else 0
        passes = CHANGES * shape.pixels * shape.channels * doubled + WRITES * result.pixels * result.channels
        flops = 2 * inner(stage.layer).weight.numel() * result.pixels
        return StageCost(flops, passes, window * itemsize, max(out, wide))
    if isinstance(stage, FixedAttention):
        flops = 4 * shape.pixels * shape.channels * (2 * shape.channels + keys)
        return StageCost(flops, CHANGES * shape.pixels * shape.channels, made=SEEN * out)
    shortcut = stage.layer if isinstance(stage, Add) else None
    flops = 2 * inner(shortcut).weight.numel() * shape.pixels if shortcut is not None else 0
    return StageCost(flops, WRITES * result.pixels * result.channels, made=out)


def vae_cost(
    stages: Sequence[StreamStage],
    size: Size,
    scale: int,
    channels: int,
    method: VaeStrategy,
    itemsize: int,
    on_cpu: bool = False,
) -> MemoryLedger:
    """Statistics and streaming of a map of `size` px through `stages`, of a VAE on the meta device.

    The map comes from the CPU: on a card it passes through pinned memory if it is an image.
    """
    return Reckoning(stages, method, itemsize, HOLES if on_cpu else 1).all(
        Shape(1, size.height, size.width, channels, scale)
    )


@dataclass
class Reckoning:
    """Walks as `settle` and `streamed` do, on outlines of maps."""

    stages: Sequence[StreamStage]
    method: VaeStrategy
    itemsize: int
    holes: int
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    kept_bytes: int = 0  # of keys and values, from when attention has looked on
    keys: int = 0  # at which attention looks: fewer than the method's where a sample has no more

    def all(self, shape: Shape) -> MemoryLedger:
        last, whole = last_normed(self.stages), None
        if shape.scale == 1:
            self.ledger.copied_bytes += LATENT_BYTES * shape.pixels * shape.channels
        start = min(self.method.start, last)
        if start:
            shape, whole = self._taken(self.stages[:start], shape, Sample.whole(size_lat(shape)), self.method.place)
        if start < last:
            sample = Sample.spread(size_lat(shape), self.method.patches, CORE_LAT)
            if whole is not None:
                whole.travel(share_read(sample, -(-reach(self.stages[start:last]) // shape.scale)))
            self._taken(self.stages[start:last], shape, sample, "device", whole)
        self._streamed(self.stages[start:], shape, whole)
        del whole  # from which the rest has streamed
        self.ledger.close()
        return self.ledger

    def _taken(
        self, stages: Sequence[StreamStage], shape: Shape, sample: Sample, where: str, whole: MetaMap | None = None
    ) -> tuple[Shape, MetaMap]:
        """`stages` one after the other over patches, or over the whole -> the last map."""
        patches = patch_shape(stages, shape, sample)
        current, kept = self._outline(patches, where), None  # `kept` is what a shortcut will read, and lives as long
        current.travel()
        self._read(shape, replace(patches, batch=1), patches.batch, whole)
        workspace = 0
        for i, stage in enumerate(stages):
            if stage.enlarges * stage.shrinks > 1:
                patches = patch_shape(stages[i:], patches, sample)
                current = self._outline(patches, where) if where == "device" and sample.corners[1:] else current
            result = patches.after(stage)
            rows = max(1, self.method.height * sample.size.width * patches.scale // (patches.batch * patches.width))
            reading = current.reading(rows) if not stage.pointwise else 0
            if isinstance(stage, FixedAttention):
                self.keys = keys_in(sample, self.method.keys)
                self._look(current, where, workspace + current.writing(rows))
            if not stage.pointwise:
                current.travel()
                kept = current if stage.keeps is not None else kept
                over = stage.keeps is None and (result.width, result.channels) == (patches.width, patches.channels)
                current = current if over else self._outline(result, where)
                current.travel()
            if isinstance(stage, Add) and kept is not None:
                kept.travel()
                reading += kept.reading(rows)
            computed = max(1, rows // stage.enlarges) if patches.batch == 1 else rows
            cost = stage_cost(stage, patches, computed, self.itemsize, self.keys)
            workspace = max(workspace, cost.window)
            out_rows = computed * stage.enlarges // stage.shrinks
            moments = result.strip(out_rows) * (MOMENTS + self.itemsize)
            scratch = workspace + reading + current.writing(out_rows) + max(cost.made, moments)
            self._spend(cost.spent(KEPT * result.pixels * result.channels, scratch))
            kept = None if isinstance(stage, Add) else kept
            patches = result
        return patches, current

    def _spend(self, cost: Cost) -> None:
        self.ledger.spend(replace(cost, scratch_bytes=cost.scratch_bytes + self.kept_bytes))

    def _look(self, current: MetaMap, where: str, beside: int) -> None:
        """Keys and values of the attention, which stay; pixels of a map on the host come through pinned memory.

        So many bytes are there `beside`.
        """
        channels = current.channels
        numbers = self.keys * channels
        self._spend(Cost(0, 0, beside + numbers * (2 * self.itemsize + WIDE_BYTES)))  # the pixels, and normalised
        self.kept_bytes = 2 * numbers * self.itemsize
        if where == "device":
            self.ledger.copied_bytes += INDEX_BYTES * self.keys
        if where == "host":
            self.ledger.copied_bytes += numbers * self.itemsize
            self.ledger.stage(numbers * self.itemsize)

    def _read(self, shape: Shape, part: Shape, parts: int, whole: MetaMap | None = None) -> None:
        """Parts of the source on their way into a map: of an image, of latents, or of the `whole` map that is there."""
        rows = 0 if whole is None else whole.reading(min(READ_ROWS, part.height)) // UPLOADS
        if shape.scale > 1 and whole is None:  # an image; latents are on the device
            for _ in range(STAGED + 1):
                self.ledger.stage(part.strip(READ_ROWS) * self.itemsize)
            self.ledger.copied_bytes += parts * part.pixels * part.channels * self.itemsize
        strip = part.strip(READ_ROWS) * self.itemsize
        self._spend(Cost(0, 0, rows + strip * (2 * parts if parts > 1 else STAGED + 1)))

    def _outline(self, shape: Shape, where: str) -> MetaMap:
        return MetaMap(self.ledger, (shape.batch, shape.height, shape.width, shape.channels), self.itemsize, where)

    def _streamed(self, stages: Sequence[StreamStage], shape: Shape, whole: MetaMap | None) -> None:
        """Beside one operation's memory, what all convolutions carry, and what waits where rows are doubled."""
        height, waiting, kept, costs, workspace = self.method.height, 0, 0, [], 0
        if whole is not None:
            whole.travel()
            waiting += whole.reading(height) // self.itemsize
        else:
            self._read(shape, shape, 1)
        for stage in stages:
            if isinstance(stage, Convolution):
                carried = replace(shape, width=shape.width * stage.enlarges, height=stage.kernel - 1)
                waiting += carried.strip(stage.kernel - 1)
                waiting += shape.strip(height) if stage.enlarges > 1 else 0
            if stage.keeps is not None:
                kept = shape.strip(height)
                waiting += shape.strip(3)
            rows = height // stage.enlarges or 1
            cost = stage_cost(stage, shape, rows, self.itemsize, self.keys)
            workspace = max(workspace, cost.window)
            scratch = cost.made + (shape.strip(rows) + kept) * self.itemsize
            costs.append(cost.spent(0, self.holes * scratch))
            kept = 0 if isinstance(stage, Add) else kept
            shape = shape.after(stage)
        self.kept_bytes += waiting * self.itemsize + self.holes * workspace
        for cost in costs:
            self._spend(cost)
        self._finish(stages, shape)

    def _finish(self, stages: Sequence[StreamStage], result: Shape) -> None:
        """The rows that leave the device, two strips of them at a time."""
        rows = max_output_rows(stages, self.method.height)
        numbers = result.strip(rows)
        self._spend(Cost(0, 0, FINISHED_BYTES * numbers))
        self.ledger.buffer(numbers * WIDE_BYTES + 1, 2)
        self.ledger.copied_bytes += WIDE_BYTES * result.pixels * result.channels


def keys_in(sample: Sample, count: int) -> int:
    """How many pixels `Sample.pixels` finds."""
    rows, columns = grid(sample.core, max(1, round(count / len(sample.corners))))
    return len(sample.corners) * rows * columns


def share_read(sample: Sample, halo: int) -> float:
    """How much of a map is read for the patches of `sample`, in whole rows for each."""
    window = sample.window(halo)
    return len(sample.corners) * window.height / sample.size.height


def patch_shape(stages: Sequence[StreamStage], shape: Shape, sample: Sample) -> Shape:
    """The patches of a map that go into `stages`, with what their cores still need around them."""
    window = sample.window(-(-reach(stages) // shape.scale)).times(shape.scale)
    return Shape(len(sample.corners), window.height, window.width, shape.channels, shape.scale)


def size_lat(shape: Shape) -> Size:
    return Size(shape.width, shape.height).divide(shape.scale)
