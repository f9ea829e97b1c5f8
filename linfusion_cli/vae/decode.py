"""Latents -> rows of pixels: statistics first, then one pass in which every row is computed once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from linfusion_cli.core.geometry import Size
from linfusion_cli.strips.storage import Storage
from linfusion_cli.vae.patches import Source
from linfusion_cli.vae.stages import Vae, decoder_stages
from linfusion_cli.vae.statistics import VaeStrategy
from linfusion_cli.vae.streaming import Conversion, Notify, nobody


def decode_rows(
    vae: Vae, latents: Tensor, method: VaeStrategy, notify: Notify = nobody, pinned: int = 0
) -> Iterator[Tensor]:
    """Latents [1, C, h, w] -> rows [rows, W, 3] in fp32 on the CPU, 0 to 1, top to bottom, each once.

    `pinned` is how many bytes of pinned memory this is planned to take.

    Raises DataError for a VAE with unknown parts, NonFinite for one that gives NaN in fp32.
    """

    def source_of(storage: Storage) -> Source:
        there = latents.to(storage.device)

        def read(top: int, bottom: int, left: int, right: int) -> Tensor:
            part = there[:, :, top:bottom, left:right].permute(0, 2, 3, 1)
            return part.to(storage.dtype).contiguous()

        return Source(Size(latents.shape[3], latents.shape[2]), 1, latents.shape[1], read)

    conversion = Conversion(vae, decoder_stages(vae), source_of, method, notify, finish=visible, pinned=pinned)
    yield from conversion.rows()


def visible(rows: Tensor) -> Tensor:
    """What a file can show of rows of pixels, in their own memory."""
    return rows.clamp_(0, 1)
