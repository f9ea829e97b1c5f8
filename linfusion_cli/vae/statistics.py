"""The statistics of a picture's maps, known before it streams: of all of it level by level, or of a sample of patches.

Every GroupNorm of a VAE needs mean and variance of a whole map. As far as maps fit, they are made whole, one after the
other, and what is left streams from the last of them; from there on, patches stand for the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from linfusion_cli.strips.stats import Moments
from linfusion_cli.strips.storage import Place, Storage
from linfusion_cli.strips.stream import Add, StreamStage, Workspace, reach, stream
from linfusion_cli.vae.attention import FixedAttention
from linfusion_cli.vae.patches import Patches, Source
from linfusion_cli.vae.sample import Sample

MIN_PATCHES = 16
CORE_LAT = 8  # side of a core: many small ones tell more than few large ones, and each carries its halo


@dataclass(frozen=True)
class VaeStrategy:
    """How a picture goes through one of a VAE's networks.

    Whole maps are made up to stage `start`, and wait in `place`; from there on about `patches` patches stand for the
    picture, 0 where no stage is left that needs them. `keys` is how many pixels attention may look at, `height` how
    many rows are computed at a time.
    """

    start: int
    patches: int
    keys: int
    height: int
    place: Place = "device"

    @property
    def statistics(self) -> str:
        """What they come from: all of the picture, all of it at first, or a sample."""
        return "exact" if not self.patches else "partly exact" if self.start else "sampled"

    def smaller(self, settled: bool) -> VaeStrategy | None:
        """The next way with less memory, None where there is none; once statistics are `settled`, lower strips only."""
        if self.start and not settled:
            return replace(self, start=0, patches=self.patches or MIN_PATCHES)
        if self.height == 1:
            return None
        return replace(self, height=self.height // 2, patches=max(min(MIN_PATCHES, self.patches), self.patches // 2))


def last_normed(stages: Sequence[StreamStage]) -> int:
    """The last stage that needs statistics; 0 if none does. Whole maps up to there make all statistics exact."""
    return max((i for i, stage in enumerate(stages) if stage.before is not None), default=0)


def starts(stages: Sequence[StreamStage]) -> list[int]:
    """Where streaming may begin, from the end: where all statistics are exact, each change of level, the beginning."""
    last = last_normed(stages)
    levels = [i for i, stage in enumerate(stages[:last]) if stage.enlarges > 1]
    return sorted({last, *levels, 0}, reverse=True)


def freeze_statistics(
    stages: Sequence[StreamStage], source: Source, method: VaeStrategy, storage: Storage
) -> tuple[Sequence[StreamStage], Source]:
    """Freeze the statistics of all `stages` -> those that are left to stream, and what is to stream through them."""
    for stage in stages:
        if stage.keeps is not None:
            stage.keeps.source = None  # an attempt that failed may have left it
    last, moments = last_normed(stages), None
    start = min(method.start, last)
    if not last:
        return stages, source
    if start:
        # Nobody but `run` holds the patches that it begins with: each map goes when the next is there.
        whole = StatisticsPass(method, storage).run(
            stages[:start], Patches.of(source, Sample.whole(source.size_lat), 0, storage)
        )
        source, moments = whole.as_source(), whole.moments
    if start < last:
        moments = sample_statistics(
            stages[start:last], source, moments, method, Storage("device", storage.device, storage.dtype)
        )
    stages[last].before.freeze(moments)
    return stages[start:], source


def sample_statistics(
    stages: Sequence[StreamStage], source: Source, moments: Moments | None, method: VaeStrategy, storage: Storage
) -> Moments:
    """Freeze the statistics of `stages`, from patches of `source` -> those of the map that comes out."""
    sample = Sample.spread(source.size_lat, method.patches, CORE_LAT)
    halo = -(-reach(stages) // source.scale)
    return StatisticsPass(method, storage).run(stages, Patches.of(source, sample, halo, storage, moments)).moments


@dataclass(frozen=True)
class StatisticsPass:
    """Runs stages on patches, one after the other, and freezes each one's statistics before it runs."""

    method: VaeStrategy
    storage: Storage
    workspace: Workspace = field(default_factory=Workspace)

    def run(self, stages: Sequence[StreamStage], patches: Patches) -> Patches:
        """`patches` after all `stages`."""
        bounds = [i for i, stage in enumerate(stages) if not stage.pointwise]
        for begin, end in zip_longest([0, *bounds[1:]], bounds[1:]):
            first = stages[begin]
            if first.enlarges * first.shrinks > 1:
                patches = patches.cropped(-(-reach(stages[begin:]) // patches.scale), self.storage)
            if first.before is not None:
                first.before.freeze(patches.moments)
            if isinstance(first, FixedAttention):
                first.look_at(patches.pixels(self.method.keys))
            patches = self._advanced(stages[begin:end], patches)
        return patches

    def _advanced(self, stages: Sequence[StreamStage], patches: Patches) -> Patches:
        """`patches` after `stages` that need no further statistics: written over the old ones where that may be."""
        self.storage.trim()
        source, keeps = patches.map, stages[0].keeps
        if keeps is not None:
            keeps.source = source
        result = replace(patches, scale=output_length(stages, patches.scale), moments=None)
        top, moments = 0, None
        for rows in stream(stages, source.read, source.height, self._height(patches), workspace=self.workspace):
            if not top and (keeps is not None or rows.shape[2:] != source.shape[2:]):
                shape = (len(rows), output_length(stages, source.height), *rows.shape[2:])
                result = replace(result, map=self.storage.new(*shape))
            result.map.write(top, rows)
            seen = result.in_cores(top, rows)
            if seen.shape[2]:
                moments = Moments.of(seen) if moments is None else moments + Moments.of(seen)
            top += rows.shape[1]
        for stage in stages:
            if isinstance(stage, Add):
                stage.kept.source = None
        return replace(result, moments=moments)

    def _height(self, patches: Patches) -> int:
        """As many rows of all patches as make `height` rows of the whole map."""
        across = len(patches.sample.corners) * patches.map.width
        return max(1, self.method.height * patches.sample.size.width * patches.scale // across)


def output_length(stages: Sequence[StreamStage], length: int) -> int:
    """How long a side of `length` is after `stages`."""
    for stage in stages:
        length = length * stage.enlarges // stage.shrinks
    return length


def max_output_rows(stages: Sequence[StreamStage], height: int) -> int:
    """How many rows may come out of `stages` at a time, `height` of them computed at a time where they are widest."""
    shrinks = math.prod(stage.shrinks for stage in stages)
    return height // shrinks + 2  # the last rows of a map come with those that were carried
