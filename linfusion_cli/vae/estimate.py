"""Estimate the memory and work of decoding and encoding, by simulating `freeze_statistics` and `stream` on shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from linfusion_cli.core.geometry import Size
from linfusion_cli.strips.copies import MAX_STAGED
from linfusion_cli.strips.cost import MAX_UPLOADS, Cost, MemoryLedger, MetaMap
from linfusion_cli.strips.dilation import unwrap_convolution
from linfusion_cli.strips.stream import Add, Convolution, StreamStage, receptive_radius
from linfusion_cli.vae.attention import FixedAttention
from linfusion_cli.vae.patches import READ_ROWS
from linfusion_cli.vae.sample import Sample, split_grid
from linfusion_cli.vae.statistics import (
    CORE_LAT,
    VaeStrategy,
    compute_max_output_rows,
    compute_output_length,
    find_last_norm,
)

FP32_BYTES = 4  # statistics and normalised values are in fp32
OUTPUT_BYTES = 13  # per output value: in fp32, in the download, and in the check for NaN
LATENT_BYTES = 4  # per latent to decode; all latents are on the device
INDEX_BYTES = 3 * 8  # per pixel that attention uses as a key: its position in the map
MOMENT_BYTES = 2 * FP32_BYTES  # per value that moments are computed from: the value and its deviation from the mean
INPUT_PASSES, OUTPUT_PASSES = 4, 4  # memory accesses per input value of a window, and per output value of a convolution
STORE_PASSES = 8  # memory accesses per value of a stored map: page faults, reading, and moments
CPU_FRAGMENTATION = 2  # factor for gaps that freed strips of other sizes leave on the heap; measured on a CPU
ATTENTION_STRIPS = 5  # strips that attention keeps at once: normalised input, queries, output and its projections


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch of maps with `scale` pixels per latent."""

    batch: int
    height: int
    width: int
    channels: int
    scale: int

    @property
    def pixels(self) -> int:
        """The pixels of all maps."""
        return self.batch * self.height * self.width

    def count_values(self, rows: int) -> int:
        """Return the number of values in `rows` rows."""
        return self.batch * min(rows, self.height) * self.width * self.channels

    def apply_stage(self, stage: StreamStage) -> BatchShape:
        """Return the output shape of `stage`."""
        height, width, scale = (compute_output_length([stage], side) for side in (self.height, self.width, self.scale))
        channels = unwrap_convolution(stage.layer).out_channels if isinstance(stage, Convolution) else self.channels
        return BatchShape(self.batch, height, width, channels, scale)


@dataclass(frozen=True)
class StageCost:
    """The cost of a stage for a complete map: its work, and the bytes of its window and of its other temporary data.

    All stages share the memory of the window.
    """

    flops: int
    passes: int
    window_bytes: int = 0
    temporary_bytes: int = 0

    def to_cost(self, extra_passes: int, scratch_bytes: int) -> Cost:
        """Return the cost with `extra_passes` more memory accesses and the given scratch memory."""
        return Cost(self.flops, self.passes + extra_passes, scratch_bytes)


def estimate_stage(stage: StreamStage, shape: BatchShape, rows: int, itemsize: int, keys: int) -> StageCost:
    """Return the cost of `stage` for a map of `shape`, with `rows` input rows at a time. They are already in memory."""
    result = shape.apply_stage(stage)
    out_bytes = result.count_values(rows * stage.upscale_factor // stage.downscale_factor) * itemsize
    if isinstance(stage, Convolution):
        upscaled = replace(shape, width=shape.width * stage.upscale_factor)
        window_bytes = upscaled.count_values(rows * stage.upscale_factor + stage.kernel - 1) * itemsize
        is_widened = stage.norm is not None and itemsize < FP32_BYTES
        fp32_bytes = FP32_BYTES * shape.count_values(rows) if is_widened else 0
        passes = INPUT_PASSES * shape.pixels * shape.channels * stage.upscale_factor**2
        passes += OUTPUT_PASSES * result.pixels * result.channels
        flops = 2 * unwrap_convolution(stage.layer).weight.numel() * result.pixels
        return StageCost(flops, passes, window_bytes, max(out_bytes, fp32_bytes))
    if isinstance(stage, FixedAttention):
        flops = 4 * shape.pixels * shape.channels * (2 * shape.channels + keys)
        passes = INPUT_PASSES * shape.pixels * shape.channels
        return StageCost(flops, passes, temporary_bytes=ATTENTION_STRIPS * out_bytes)
    shortcut = stage.layer if isinstance(stage, Add) else None
    flops = 2 * unwrap_convolution(shortcut).weight.numel() * shape.pixels if shortcut is not None else 0
    return StageCost(flops, OUTPUT_PASSES * result.pixels * result.channels, temporary_bytes=out_bytes)


def estimate_vae(
    stages: Sequence[StreamStage],
    size: Size,
    scale: int,
    channels: int,
    strategy: VaeStrategy,
    itemsize: int,
    on_cpu: bool = False,
) -> MemoryLedger:
    """Return the cost of statistics and streaming for an input map of `size` pixels. The VAE can be on the meta device.

    The input comes from the CPU. If it is an image and the device is a GPU, it is staged through pinned memory.
    """
    simulator = StreamSimulator(stages, strategy, itemsize, CPU_FRAGMENTATION if on_cpu else 1)
    return simulator.run(BatchShape(1, size.height, size.width, channels, scale))


@dataclass
class StreamSimulator:
    """Simulates the allocations of a conversion with MetaMaps.

    The ledger counts a MetaMap as long as the object exists, so references here must live as long as in the real code.
    """

    stages: Sequence[StreamStage]
    strategy: VaeStrategy
    itemsize: int
    fragmentation: int
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    persistent_bytes: int = 0  # keys and values of attention, once they are computed
    keys: int = 0  # pixels used as keys: fewer than in the strategy if the sample has fewer

    def run(self, shape: BatchShape) -> MemoryLedger:
        """Simulate the conversion of an input of `shape` and return the ledger."""
        last, complete = find_last_norm(self.stages), None
        if shape.scale == 1:
            self.ledger.copied_bytes += LATENT_BYTES * shape.pixels * shape.channels
        start = min(self.strategy.start, last)
        if start:
            sample = Sample.full(compute_size_lat(shape))
            shape, complete = self._simulate_statistics(self.stages[:start], shape, sample, self.strategy.place)
        if start < last:
            sample = Sample.on_grid(compute_size_lat(shape), self.strategy.patches, CORE_LAT)
            if complete is not None:
                halo = -(-receptive_radius(self.stages[start:last]) // shape.scale)
                complete.transfer(compute_read_share(sample, halo))
            self._simulate_statistics(self.stages[start:last], shape, sample, "device", complete)
        self._simulate_streaming(self.stages[start:], shape, complete)
        del complete  # it must be alive until streaming ends
        self.ledger.close()
        return self.ledger

    def _simulate_statistics(
        self,
        stages: Sequence[StreamStage],
        shape: BatchShape,
        sample: Sample,
        where: str,
        complete: MetaMap | None = None,
    ) -> tuple[BatchShape, MetaMap]:
        """Simulate a StatisticsPass over the patches of `sample`. Return the shape of the last map, and the map.

        `complete` is the map that the patches are read from, None if they are read from the image or the latents.
        """
        patches = build_patch_shape(stages, shape, sample)
        current, shortcut = self._create_map(patches, where), None
        current.transfer()
        self._read(shape, replace(patches, batch=1), patches.batch, complete)
        workspace = 0
        for i, stage in enumerate(stages):
            if stage.upscale_factor * stage.downscale_factor > 1:
                patches = build_patch_shape(stages[i:], patches, sample)
                current = self._create_map(patches, where) if where == "device" and sample.corners[1:] else current
            result = patches.apply_stage(stage)
            rows = max(1, self.strategy.height * sample.size.width * patches.scale // (patches.batch * patches.width))
            reading = current.read_bytes(rows) if not stage.is_pointwise else 0
            if isinstance(stage, FixedAttention):
                self.keys = count_keys(sample, self.strategy.keys)
                self._compute_keys(current, where, workspace + current.write_bytes(rows))
            if not stage.is_pointwise:
                current.transfer()
                shortcut = current if stage.residual is not None else shortcut
                is_same_shape = (result.width, result.channels) == (patches.width, patches.channels)
                is_in_place = stage.residual is None and is_same_shape
                current = current if is_in_place else self._create_map(result, where)
                current.transfer()
            if isinstance(stage, Add) and shortcut is not None:
                shortcut.transfer()
                reading += shortcut.read_bytes(rows)
            computed = max(1, rows // stage.upscale_factor) if patches.batch == 1 else rows
            cost = estimate_stage(stage, patches, computed, self.itemsize, self.keys)
            workspace = max(workspace, cost.window_bytes)
            out_rows = computed * stage.upscale_factor // stage.downscale_factor
            moments = result.count_values(out_rows) * (MOMENT_BYTES + self.itemsize)
            scratch = workspace + reading + current.write_bytes(out_rows) + max(cost.temporary_bytes, moments)
            self._charge(cost.to_cost(STORE_PASSES * result.pixels * result.channels, scratch))
            shortcut = None if isinstance(stage, Add) else shortcut
            patches = result
        return patches, current

    def _charge(self, cost: Cost) -> None:
        self.ledger.charge(replace(cost, scratch_bytes=cost.scratch_bytes + self.persistent_bytes))

    def _compute_keys(self, current: MetaMap, where: str, extra_bytes: int) -> None:
        """Simulate keys and values of attention, which stay in memory, with `extra_bytes` of other data.

        Pixels of a map on the host are staged through pinned memory.
        """
        values = self.keys * current.channels
        self._charge(Cost(0, 0, extra_bytes + values * (2 * self.itemsize + FP32_BYTES)))  # pixels, and normalised
        self.persistent_bytes = 2 * values * self.itemsize
        if where == "device":
            self.ledger.copied_bytes += INDEX_BYTES * self.keys
        if where == "host":
            self.ledger.copied_bytes += values * self.itemsize
            self.ledger.stage(values * self.itemsize)

    def _read(self, shape: BatchShape, part: BatchShape, parts: int, complete: MetaMap | None = None) -> None:
        """Simulate reading `parts` parts of the image, of the latents, or of the `complete` map."""
        rows = 0 if complete is None else complete.read_bytes(min(READ_ROWS, part.height)) // MAX_UPLOADS
        if shape.scale > 1 and complete is None:  # an image; latents are already on the device
            for _ in range(MAX_STAGED + 1):
                self.ledger.stage(part.count_values(READ_ROWS) * self.itemsize)
            self.ledger.copied_bytes += parts * part.pixels * part.channels * self.itemsize
        strip = part.count_values(READ_ROWS) * self.itemsize
        self._charge(Cost(0, 0, rows + strip * (2 * parts if parts > 1 else MAX_STAGED + 1)))

    def _create_map(self, shape: BatchShape, where: str) -> MetaMap:
        return MetaMap(self.ledger, (shape.batch, shape.height, shape.width, shape.channels), self.itemsize, where)

    def _simulate_streaming(self, stages: Sequence[StreamStage], shape: BatchShape, complete: MetaMap | None) -> None:
        """Simulate `stream`: one operation at a time, the rows carried by convolutions, and rows queued for later."""
        height, queued, shortcut, costs, workspace = self.strategy.height, 0, 0, [], 0
        if complete is not None:
            complete.transfer()
            queued += complete.read_bytes(height) // self.itemsize
        else:
            self._read(shape, shape, 1)
        for stage in stages:
            if isinstance(stage, Convolution):
                carried = replace(shape, width=shape.width * stage.upscale_factor, height=stage.kernel - 1)
                queued += carried.count_values(stage.kernel - 1)
                queued += shape.count_values(height) if stage.upscale_factor > 1 else 0
            if stage.residual is not None:
                shortcut = shape.count_values(height)
                queued += shape.count_values(3)
            rows = height // stage.upscale_factor or 1
            cost = estimate_stage(stage, shape, rows, self.itemsize, self.keys)
            workspace = max(workspace, cost.window_bytes)
            scratch = cost.temporary_bytes + (shape.count_values(rows) + shortcut) * self.itemsize
            costs.append(cost.to_cost(0, self.fragmentation * scratch))
            shortcut = 0 if isinstance(stage, Add) else shortcut
            shape = shape.apply_stage(stage)
        self.persistent_bytes += queued * self.itemsize + self.fragmentation * workspace
        for cost in costs:
            self._charge(cost)
        self._download(stages, shape)

    def _download(self, stages: Sequence[StreamStage], result: BatchShape) -> None:
        """Simulate the download of the output, two strips at a time."""
        values = result.count_values(compute_max_output_rows(stages, self.strategy.height))
        self._charge(Cost(0, 0, OUTPUT_BYTES * values))
        self.ledger.buffer(values * FP32_BYTES + 1, 2)
        self.ledger.copied_bytes += FP32_BYTES * result.pixels * result.channels


def count_keys(sample: Sample, count: int) -> int:
    """Return how many pixels `Sample.pick_pixels` returns for `count`."""
    rows, columns = split_grid(sample.core, max(1, round(count / len(sample.corners))))
    return len(sample.corners) * rows * columns


def compute_read_share(sample: Sample, halo: int) -> float:
    """Return how often a map is read for the patches of `sample`; each patch reads complete rows."""
    return len(sample.corners) * sample.patch_size(halo).height / sample.size.height


def build_patch_shape(stages: Sequence[StreamStage], shape: BatchShape, sample: Sample) -> BatchShape:
    """Return the shape of the patches of a map, with the halo that `stages` need."""
    patch = sample.patch_size(-(-receptive_radius(stages) // shape.scale)).times(shape.scale)
    return BatchShape(len(sample.corners), patch.height, patch.width, shape.channels, shape.scale)


def compute_size_lat(shape: BatchShape) -> Size:
    """Return the size in latents."""
    return Size(shape.width, shape.height).divide(shape.scale)
