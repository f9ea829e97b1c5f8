"""Normalisation statistics of a VAE's maps, computed before the image is streamed.

Every GroupNorm needs the mean and variance of its complete input map. Complete maps are computed one after the other,
as far as memory allows, and the remaining stages stream from the last of them. The statistics of those stages are
estimated from a sample of patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from linfusion_cli.strips.stats import Moments
from linfusion_cli.strips.storage import Place, Storage
from linfusion_cli.strips.stream import Add, StreamStage, Workspace, receptive_radius, stream
from linfusion_cli.vae.attention import FixedAttention
from linfusion_cli.vae.patches import Patches, Source
from linfusion_cli.vae.sample import Sample

MIN_PATCHES = 16
CORE_LAT = 8  # side of a core: many small cores are more representative than few large ones, but each needs a halo


@dataclass(frozen=True)
class VaeStrategy:
    """How an image is passed through the encoder or decoder of a VAE.

    The maps of the stages before `start` are computed completely and stored in `place`. The statistics of the other
    stages come from about `patches` patches, 0 if none of them needs statistics. Attention uses up to `keys` pixels as
    keys; `height` is the number of rows computed at a time.
    """

    start: int
    patches: int
    keys: int
    height: int
    place: Place = "device"

    @property
    def statistics(self) -> str:
        """Whether the statistics are "exact", "partly exact" (those of the first stages) or "sampled"."""
        return "exact" if not self.patches else "partly exact" if self.start else "sampled"

    def reduce_memory(self, are_statistics_frozen: bool) -> VaeStrategy | None:
        """Return the next strategy that needs less memory, or None after the last one.

        Once the statistics are frozen, only the height of strips is reduced.
        """
        if self.start and not are_statistics_frozen:
            return replace(self, start=0, patches=self.patches or MIN_PATCHES)
        if self.height == 1:
            return None
        return replace(self, height=self.height // 2, patches=max(min(MIN_PATCHES, self.patches), self.patches // 2))


def find_last_norm(stages: Sequence[StreamStage]) -> int:
    """Return the last stage with a norm, 0 if none has one. Statistics are exact if streaming starts at this stage."""
    return max((i for i, stage in enumerate(stages) if stage.norm is not None), default=0)


def find_stream_starts(stages: Sequence[StreamStage]) -> list[int]:
    """Return the stages that streaming can start from, in descending order: the last norm, each upsampling, and 0."""
    last = find_last_norm(stages)
    levels = [i for i, stage in enumerate(stages[:last]) if stage.upscale_factor > 1]
    return sorted({last, *levels, 0}, reverse=True)


def freeze_statistics(
    stages: Sequence[StreamStage], source: Source, strategy: VaeStrategy, storage: Storage
) -> tuple[Sequence[StreamStage], Source]:
    """Freeze the statistics of all `stages`. Return the stages that remain to be streamed, and their source."""
    for stage in stages:
        if stage.residual is not None:
            stage.residual.source = None  # possibly set by a failed attempt
    last, moments = find_last_norm(stages), None
    start = min(strategy.start, last)
    if not last:
        return stages, source
    if start:
        # Only `run` may refer to the patches: each map is freed once the next one exists.
        complete = StatisticsPass(strategy, storage).run(
            stages[:start], Patches.read_from(source, Sample.full(source.size_lat), 0, storage)
        )
        source, moments = complete.to_source(), complete.moments
    if start < last:
        moments = freeze_sampled_statistics(
            stages[start:last], source, moments, strategy, Storage("device", storage.device, storage.dtype)
        )
    norm = stages[last].norm
    assert norm is not None and moments is not None  # `last` has a norm, and a pass ends there
    norm.freeze(moments)
    return stages[start:], source


def freeze_sampled_statistics(
    stages: Sequence[StreamStage], source: Source, moments: Moments | None, strategy: VaeStrategy, storage: Storage
) -> Moments:
    """Freeze the statistics of `stages`, estimated from patches of `source`. Return the moments of the output map."""
    sample = Sample.on_grid(source.size_lat, strategy.patches, CORE_LAT)
    halo = -(-receptive_radius(stages) // source.scale)
    output = StatisticsPass(strategy, storage).run(stages, Patches.read_from(source, sample, halo, storage, moments))
    assert output.moments is not None
    return output.moments


@dataclass(frozen=True)
class StatisticsPass:
    """Runs stages on patches one after the other, and freezes the statistics of each stage before it runs."""

    strategy: VaeStrategy
    storage: Storage
    workspace: Workspace = field(default_factory=Workspace)

    def run(self, stages: Sequence[StreamStage], patches: Patches) -> Patches:
        """Return the output of all `stages` for `patches`."""
        bounds = [i for i, stage in enumerate(stages) if not stage.is_pointwise]
        for begin, end in zip_longest([0, *bounds[1:]], bounds[1:]):
            first = stages[begin]
            if first.upscale_factor * first.downscale_factor > 1:
                patches = patches.crop_halo(-(-receptive_radius(stages[begin:]) // patches.scale), self.storage)
            if first.norm is not None:
                assert patches.moments is not None  # a convolution precedes every norm
                first.norm.freeze(patches.moments)
            if isinstance(first, FixedAttention):
                first.set_keys(patches.gather_pixels(self.strategy.keys))
            patches = self._apply_segment(stages[begin:end], patches)
        return patches

    def _apply_segment(self, stages: Sequence[StreamStage], patches: Patches) -> Patches:
        """Return the output of `stages`, of which only the first can have a norm, which must be frozen.

        The output overwrites the input map if the width and channels are equal and no shortcut needs the input.
        """
        self.storage.trim()
        source, residual = patches.map, stages[0].residual
        if residual is not None:
            residual.source = source
        result = replace(patches, scale=compute_output_length(stages, patches.scale), moments=None)
        top, moments = 0, None
        for rows in stream(stages, source.read, source.height, self._compute_height(patches), workspace=self.workspace):
            if not top and (residual is not None or rows.shape[2:] != source.shape[2:]):
                shape = (len(rows), compute_output_length(stages, source.height), *rows.shape[2:])
                result = replace(result, map=self.storage.new(*shape))
            result.map.write(top, rows)
            pixels = result.select_core_pixels(top, rows)
            if pixels.shape[2]:
                moments = Moments.from_rows(pixels) if moments is None else moments + Moments.from_rows(pixels)
            top += rows.shape[1]
        for stage in stages:
            if isinstance(stage, Add):
                stage.shortcut.source = None
        return replace(result, moments=moments)

    def _compute_height(self, patches: Patches) -> int:
        """Return the rows per strip: all patches together have as many pixels as a strip of the complete map."""
        total_width = len(patches.sample.corners) * patches.map.width
        return max(1, self.strategy.height * patches.sample.size.width * patches.scale // total_width)


def compute_output_length(stages: Sequence[StreamStage], length: int) -> int:
    """Return the output length of `stages` for a side of input length `length`."""
    for stage in stages:
        length = length * stage.upscale_factor // stage.downscale_factor
    return length


def compute_max_output_rows(stages: Sequence[StreamStage], height: int) -> int:
    """Return the maximum number of rows that `stages` output at a time, given `height` rows at full resolution."""
    downscale_factor = math.prod(stage.downscale_factor for stage in stages)
    return height // downscale_factor + 2  # the last rows of a map are output with the carried rows
