"""Parts of a map that stand for all of it while statistics are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linfusion_cli.core.geometry import Size, split_rows
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.stats import Moments
from linfusion_cli.strips.storage import Storage
from linfusion_cli.vae.sample import Sample

READ_ROWS = 64  # rows of a source read at a time: whoever resizes them reads some around them each time


@dataclass(frozen=True)
class Source:
    """A map of `size` px that streams: `read` gives [1, bottom - top, right - left, C] on the device, ready to use.

    `scale` is how many of its pixels a latent has along a side.
    """

    size: Size
    scale: int
    channels: int
    read: Callable[[int, int, int, int], Tensor]  # top, bottom, left, right

    @property
    def size_lat(self) -> Size:
        return self.size.divide(self.scale)

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.read(top, bottom, 0, self.size.width)


@dataclass(frozen=True)
class Patches:
    """A batch of parts of one size: the sample's cores, and `halo` latents around each as far as there is picture.

    `map` [B, h, w, C] has `scale` pixels for a latent; `moments` [1, C] are those of all cores together.
    """

    map: FeatureMap
    scale: int
    sample: Sample
    halo: int
    moments: Moments | None = None

    @staticmethod
    def of(source: Source, sample: Sample, halo: int, storage: Storage, moments: Moments | None = None) -> Patches:
        """The patches of `source`; `moments` are those of the whole, where they are known."""
        window = sample.window(halo).times(source.scale)
        found = storage.new(len(sample.corners), window.height, window.width, source.channels)
        for top, bottom in split_rows(window.height, READ_ROWS):
            rows = [
                source.read(first + top, first + bottom, left, left + window.width)
                for first, left in ((row * source.scale, column * source.scale) for row, column in sample.windows(halo))
            ]
            found.write(top, torch.cat(rows))
        return Patches(found, source.scale, sample, halo, moments)

    def as_source(self) -> Source:
        """The map, which is that of the whole picture, as what streams."""

        def read(top: int, bottom: int, left: int, right: int) -> Tensor:
            if (left, right) == (0, self.map.width):
                return self.map.read(top, bottom)
            # A patch, which does not hold on to the rows that it was cut from.
            return self.map.read_alone(top, bottom)[:, :, left:right].contiguous()

        return Source(Size(self.map.width, self.map.height), self.scale, self.map.channels, read)

    @property
    def cores(self) -> list[tuple[int, int]]:
        """The (top, left) pixel of the core in each patch."""
        pairs = zip(self.sample.corners, self.sample.windows(self.halo), strict=True)
        return [((core[0] - patch[0]) * self.scale, (core[1] - patch[1]) * self.scale) for core, patch in pairs]

    def in_cores(self, top: int, rows: Tensor) -> Tensor:
        """What of `rows` [B, n, w, C], which begin at row `top` of every patch, lies in cores: [1, 1, N, C]."""
        core = self.sample.core.times(self.scale)
        parts = [
            part[max(0, first - top) : max(0, first - top + core.height), left : left + core.width].flatten(0, 1)
            for part, (first, left) in zip(rows, self.cores, strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None, None]

    def pixels(self, count: int) -> Tensor:
        """About `count` pixels [1, 1, N, C] spread over all cores, of a map in which a latent is a pixel."""
        cores = self.cores
        places = [
            (patch, cores[patch][0] + row, cores[patch][1] + column) for patch, row, column in self.sample.pixels(count)
        ]
        return self.map.pixels(*zip(*places, strict=True))[None, None]

    def cropped(self, halo: int, storage: Storage) -> Patches:
        """The same with less around the cores, if `halo` latents are less."""
        if halo >= self.halo or self.sample.window(halo) == self.sample.window(self.halo):
            return self
        size, whole = self.sample.window(halo).times(self.scale), self.map.read(0, self.map.height)
        storage.trim()
        result = storage.new(len(whole), size.height, size.width, self.map.channels)
        places = zip(self.sample.windows(self.halo), self.sample.windows(halo), strict=True)
        for i, (before, after) in enumerate(places):
            top, left = ((new - old) * self.scale for old, new in zip(before, after, strict=True))
            result.tensor[i].copy_(whole[i, top : top + size.height, left : left + size.width])
        return replace(self, map=result, halo=halo)
