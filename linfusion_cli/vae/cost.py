"""What decoding and encoding will need, reckoned from the VAE's shapes on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from linfusion_cli.geometry import Size
from linfusion_cli.vae.tiles import Windows

WIDEST_MAPS = 5  # maps as wide as two of the outermost channels that are alive at once: input, norm, activation, result
PASSES = 40  # times that the numbers of such a map are read or written beside products
STRIPS = 3  # strips of pixels in fp32 that are alive at once: decoded, blended, carried


@dataclass(frozen=True)
class VaeCost:
    """One pass over a picture: products and other passes over numbers, and the memory beyond the weights.

    `window_numbers` are alive at once on the device, `strip_bytes` on the host.
    """

    flops: int
    passes: int
    window_numbers: int
    strip_bytes: int


@torch.inference_mode()
def vae_cost(vae: AutoencoderKL, size: Size, window_lat: int, encode: bool) -> VaeCost:
    """Decoding (or encoding) a picture of `size` px in windows of `window_lat` latents; `vae` is on the meta device."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size_lat = size.divided(factor)
    sides = [min(length, window_lat) for length in (size_lat.height, size_lat.width)]
    windows = len(Windows.over(size_lat.height, window_lat).spans) * len(Windows.over(size_lat.width, window_lat).spans)
    window_px = sides[0] * sides[1] * factor**2
    widest = window_px * 2 * vae.config.block_out_channels[0]
    flops = windows * window_flops(vae, *sides, factor, encode)
    strip_bytes = STRIPS * 4 * 3 * sides[0] * factor * size.width
    return VaeCost(flops, windows * widest * PASSES, WIDEST_MAPS * widest, strip_bytes)


def window_flops(vae: AutoencoderKL, height_lat: int, width_lat: int, factor: int, encode: bool) -> int:
    """The products of one window, as torch itself counts them."""
    with FlopCounterMode(display=False) as counter:
        if encode:
            vae.encoder(torch.empty(1, 3, height_lat * factor, width_lat * factor, device="meta"))
        else:
            vae.decoder(torch.empty(1, vae.config.latent_channels, height_lat, width_lat, device="meta"))
    return counter.get_total_flops()
