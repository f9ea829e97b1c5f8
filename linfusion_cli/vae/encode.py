"""Encode rows of pixels to latents: collect statistics first, then compute every row once in a single pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from linfusion_cli.core.geometry import Size
from linfusion_cli.strips.storage import Storage
from linfusion_cli.vae.patches import READ_ROWS, Source
from linfusion_cli.vae.stages import Vae, build_encoder_stages
from linfusion_cli.vae.statistics import VaeStrategy
from linfusion_cli.vae.streaming import Conversion, Notify, ignore_notice

RGB_CHANNELS = 3
LOGVAR_LIMITS = (-30.0, 20.0)  # as in diffusers' DiagonalGaussianDistribution

ReadRegion = Callable[[int, int, int, int], Tensor]  # (top, bottom, left, right) -> pixels [h, w, 3] in [0, 1]
DrawNoise = Callable[[int, int], Tensor]  # (top, bottom) in latents -> standard normal [1, C, bottom - top, w]


def encode_rows(
    vae: Vae,
    read: ReadRegion,
    size: Size,
    strategy: VaeStrategy,
    noise: DrawNoise | None = None,
    notify: Notify = ignore_notice,
    pinned_bytes: int = 0,
) -> Iterator[Tensor]:
    """Encode an image of `size` px and yield rows of scaled latents [1, C, n, w] in fp32 on the CPU.

    The latents are the mean of the posterior, or a sample of it if `noise` is given. `pinned_bytes` and the raised
    errors are those of `decode_rows`.
    """

    def open_source(storage: Storage) -> Source:
        def read_to_device(top: int, bottom: int, left: int, right: int) -> Tensor:
            return storage.copies.to_device(read(top, bottom, left, right), storage.dtype)[None]

        return Source(size, math.prod(stage.downscale_factor for stage in stages), RGB_CHANNELS, read_to_device)

    stages, top = build_encoder_stages(vae), 0
    conversion = Conversion(vae, stages, open_source, strategy, notify, READ_ROWS, pinned_bytes=pinned_bytes)
    for rows in conversion.stream_rows():
        moments, bottom = rows.permute(2, 0, 1)[None], top + len(rows)
        drawn = noise(top, bottom) if noise else None
        yield sample_latents(moments, vae.config["latent_channels"], drawn) * vae.config["scaling_factor"]
        top = bottom


def sample_latents(moments: Tensor, channels: int, noise: Tensor | None) -> Tensor:
    """Return latents [1, C, n, w], given mean and log variance [1, 2C, n, w], or the latents themselves (tiny VAE)."""
    if moments.shape[1] == channels or noise is None:
        return moments[:, :channels]
    mean, logvar = moments.chunk(2, dim=1)
    return mean + (logvar.clamp(*LOGVAR_LIMITS) / 2).exp() * noise
