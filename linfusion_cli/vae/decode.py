"""Decode latents to rows of pixels: collect statistics first, then compute every row once in a single pass."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from linfusion_cli.core.geometry import Size
from linfusion_cli.strips.storage import Storage
from linfusion_cli.vae.patches import Source
from linfusion_cli.vae.stages import Vae, build_decoder_stages
from linfusion_cli.vae.statistics import VaeStrategy
from linfusion_cli.vae.streaming import Conversion, Notify, ignore_notice


def decode_rows(
    vae: Vae, latents: Tensor, strategy: VaeStrategy, notify: Notify = ignore_notice, pinned_bytes: int = 0
) -> Iterator[Tensor]:
    """Decode latents [1, C, h, w] and yield rows [n, W, 3], fp32 on the CPU in [0, 1], from top to bottom.

    `pinned_bytes` is the planned amount of pinned memory. Raise DataError if the VAE has unsupported parts, and
    NonFinite if it returns NaN in fp32.
    """

    def open_source(storage: Storage) -> Source:
        on_device = latents.to(storage.device)

        def read(top: int, bottom: int, left: int, right: int) -> Tensor:
            part = on_device[:, :, top:bottom, left:right].permute(0, 2, 3, 1)
            return part.to(storage.dtype).contiguous()

        return Source(Size(latents.shape[3], latents.shape[2]), 1, latents.shape[1], read)

    stages = build_decoder_stages(vae)
    conversion = Conversion(
        vae, stages, open_source, strategy, notify, finish=clamp_to_range, pinned_bytes=pinned_bytes
    )
    yield from conversion.stream_rows()


def clamp_to_range(rows: Tensor) -> Tensor:
    """Clamp pixels to [0, 1] in place."""
    return rows.clamp_(0, 1)
