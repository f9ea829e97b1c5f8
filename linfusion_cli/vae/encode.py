"""Rows of pixels -> latents: statistics first, then one pass in which every row is computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from linfusion_cli.core.geometry import Size
from linfusion_cli.strips.storage import Storage
from linfusion_cli.vae.patches import READ_ROWS, Source
from linfusion_cli.vae.stages import Vae, encoder_stages
from linfusion_cli.vae.statistics import VaeStrategy
from linfusion_cli.vae.streaming import Conversion, Notify, nobody

COLOURS = 3
LOGVAR_LIMITS = (-30.0, 20.0)  # those of diffusers' DiagonalGaussianDistribution

ReadRegion = Callable[[int, int, int, int], Tensor]  # (top, bottom, left, right) -> pixels [h, w, 3], 0 to 1
DrawNoise = Callable[[int, int], Tensor]  # (top, bottom) in latents -> standard normal [1, C, bottom - top, w]


def encode_rows(
    vae: Vae,
    read: ReadRegion,
    size: Size,
    method: VaeStrategy,
    noise: DrawNoise | None = None,
    notify: Notify = nobody,
    pinned: int = 0,
) -> Iterator[Tensor]:
    """A picture of `size` px -> the rows of its latents [1, C, rows, w] in fp32 on the CPU, as the UNet expects them.

    They are the mean of the encoder's distribution, or with `noise` a draw from it. `pinned` and errors as in
    `decode_rows`.
    """

    def source_of(storage: Storage) -> Source:
        def ready(*region: int) -> Tensor:
            return storage.copies.to_device(read(*region), storage.dtype)[None]

        return Source(size, math.prod(stage.shrinks for stage in stages), COLOURS, ready)

    stages, top = encoder_stages(vae), 0
    for rows in Conversion(vae, stages, source_of, method, notify, READ_ROWS, pinned=pinned).rows():
        found, bottom = rows.permute(2, 0, 1)[None], top + len(rows)
        drawn = noise(top, bottom) if noise else None
        yield latents_of(found, vae.config.latent_channels, drawn) * vae.config.scaling_factor
        top = bottom


def latents_of(found: Tensor, channels: int, noise: Tensor | None) -> Tensor:
    """Mean and logarithm of the variance [1, 2C, n, w] -> latents [1, C, n, w]; a tiny VAE gives those at once."""
    if found.shape[1] == channels or noise is None:
        return found[:, :channels]
    mean, logvar = found.chunk(2, dim=1)
    return mean + (logvar.clamp(*LOGVAR_LIMITS) / 2).exp() * noise
