"""Patches of a map, from which the statistics of the complete map are estimated."""

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

READ_ROWS = 64  # rows of a source read at a time; few reads, because resizing needs extra rows around each


@dataclass(frozen=True)
class Source:
    """An input map of `size` pixels. `read` returns [1, bottom - top, right - left, C] on the device, in its dtype.

    `scale` is the number of pixels per latent along each side.
    """

    size: Size
    scale: int
    channels: int
    read: Callable[[int, int, int, int], Tensor]  # top, bottom, left, right

    @property
    def size_lat(self) -> Size:
        """The size in latents."""
        return self.size.divide(self.scale)

    def read_rows(self, top: int, bottom: int) -> Tensor:
        """Return complete rows [1, bottom - top, W, C]."""
        return self.read(top, bottom, 0, self.size.width)


@dataclass(frozen=True)
class Patches:
    """A batch of equally sized patches: the sample's cores, with up to `halo` latents of the image around each.

    `map` [B, h, w, C] has `scale` pixels per latent. `moments` [1, C] are those of all cores together.
    """

    map: FeatureMap
    scale: int
    sample: Sample
    halo: int
    moments: Moments | None = None

    @staticmethod
    def read_from(
        source: Source, sample: Sample, halo: int, storage: Storage, moments: Moments | None = None
    ) -> Patches:
        """Read the patches from `source`. `moments` are those of the complete map, if known."""
        patch = sample.patch_size(halo).times(source.scale)
        result = storage.new(len(sample.corners), patch.height, patch.width, source.channels)
        for top, bottom in split_rows(patch.height, READ_ROWS):
            corners = [(row * source.scale, column * source.scale) for row, column in sample.patch_corners(halo)]
            rows = [source.read(first + top, first + bottom, left, left + patch.width) for first, left in corners]
            result.write(top, torch.cat(rows))
        return Patches(result, source.scale, sample, halo, moments)

    def to_source(self) -> Source:
        """Return the map as a source. It must be the map of the full image."""

        def read(top: int, bottom: int, left: int, right: int) -> Tensor:
            if (left, right) == (0, self.map.width):
                return self.map.read(top, bottom)
            # A copy, because a view would keep the complete rows in memory.
            return self.map.read_without_prefetch(top, bottom)[:, :, left:right].contiguous()

        return Source(Size(self.map.width, self.map.height), self.scale, self.map.channels, read)

    @property
    def cores(self) -> list[tuple[int, int]]:
        """The (top, left) pixel of the core within each patch."""
        pairs = zip(self.sample.corners, self.sample.patch_corners(self.halo), strict=True)
        return [((core[0] - patch[0]) * self.scale, (core[1] - patch[1]) * self.scale) for core, patch in pairs]

    def select_core_pixels(self, top: int, rows: Tensor) -> Tensor:
        """Return the core pixels [1, 1, N, C] among `rows` [B, n, W, C], which start at row `top` of every patch."""
        core = self.sample.core.times(self.scale)
        parts = [
            part[max(0, first - top) : max(0, first - top + core.height), left : left + core.width].flatten(0, 1)
            for part, (first, left) in zip(rows, self.cores, strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None, None]

    def gather_pixels(self, count: int) -> Tensor:
        """Return about `count` pixels [1, 1, N, C] spread over all cores. The map must have one pixel per latent."""
        cores, pixels = self.cores, self.sample.pick_pixels(count)
        places = [(patch, cores[patch][0] + row, cores[patch][1] + column) for patch, row, column in pixels]
        return self.map.read_pixels(*zip(*places, strict=True))[None, None]

    def crop_halo(self, halo: int, storage: Storage) -> Patches:
        """Return the patches with the halo reduced to `halo` latents, or unchanged if it is not larger."""
        if halo >= self.halo or self.sample.patch_size(halo) == self.sample.patch_size(self.halo):
            return self
        size, rows = self.sample.patch_size(halo).times(self.scale), self.map.read(0, self.map.height)
        storage.trim()
        result = storage.new(len(rows), size.height, size.width, self.map.channels)
        corners = zip(self.sample.patch_corners(self.halo), self.sample.patch_corners(halo), strict=True)
        for i, (before, after) in enumerate(corners):
            top, left = ((new - old) * self.scale for old, new in zip(before, after, strict=True))
            result.tensor[i].copy_(rows[i, top : top + size.height, left : left + size.width])
        return replace(self, map=result, halo=halo)
