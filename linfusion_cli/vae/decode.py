"""Latents -> rows of pixels: statistics first, then one pass in which every row is computed once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from linfusion_cli.geometry import Size
from linfusion_cli.strips.storage import Storage
from linfusion_cli.vae.conversion import Conversion, Notify, nobody
from linfusion_cli.vae.patches import Source
from linfusion_cli.vae.stages import Vae, decoder_stages
from linfusion_cli.vae.statistics import Method


def decode_rows(vae: Vae, latents: Tensor, method: Method, notify: Notify = nobody) -> Iterator[Tensor]:
    """Latents [1, C, h, w] -> rows [rows, W, 3] in fp32 on the CPU, 0 to 1, top to bottom, each once.

    Raises DataError for a VAE with unknown parts, NonFinite for one that gives NaN in fp32.
    """

    def source_of(storage: Storage) -> Source:
        def read(top: int, bottom: int, left: int, right: int) -> Tensor:
            part = latents[:, :, top:bottom, left:right].permute(0, 2, 3, 1)
            return part.to(storage.device, storage.dtype).contiguous()

        return Source(Size(latents.shape[3], latents.shape[2]), 1, read)

    for rows in Conversion(vae, decoder_stages(vae), source_of, method, notify).rows():
        yield rows.clamp(0, 1)
