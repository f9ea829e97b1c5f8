"""Rows of pixels -> latents, strip by strip: overlapping windows of the encoder's native size, blended."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from linfusion_cli.geometry import Size
from linfusion_cli.vae.tiles import Windows

ReadRows = Callable[[int, int], Tensor]  # (top, bottom) -> rows [bottom - top, W, 3], 0 to 1


def encode_rows(vae: AutoencoderKL, read_rows: ReadRows, size: Size, window_lat: int) -> Iterator[Tensor]:
    """A picture of `size` px, given by rows -> the final rows of its latents [1, C, rows, w] in fp32 on the CPU.

    Latents are the mean of the encoder's distribution, scaled as the UNet expects them.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size_lat = size.divided(factor)
    vertical = Windows.over(size_lat.height, window_lat)
    carried = torch.zeros(0)
    for i, (top, bottom) in enumerate(vertical.spans):
        strip = _encode_strip(vae, read_rows(top * factor, bottom * factor), size_lat.width, window_lat, factor)
        strip *= vertical.weights(i)[:, None]
        if i > 0:
            strip[:, :, : carried.shape[2]] += carried
        finished = vertical.final(i) - top
        carried = strip[:, :, finished:].clone()
        yield strip[:, :, :finished]


def _encode_strip(vae: AutoencoderKL, rows: Tensor, width_lat: int, window_lat: int, factor: int) -> Tensor:
    """Rows [H, W, 3] -> latents [1, C, h, w], the windows blended from left to right."""
    horizontal = Windows.over(width_lat, window_lat)
    strip = torch.zeros(1, vae.config.latent_channels, rows.shape[0] // factor, width_lat)
    for i, (left, right) in enumerate(horizontal.spans):
        latents = _encode_window(vae, rows[:, left * factor : right * factor])
        strip[..., left:right] += latents * horizontal.weights(i)
    return strip


@torch.inference_mode()
def _encode_window(vae: AutoencoderKL, rows: Tensor) -> Tensor:
    """One window of pixels [H, W, 3] -> latents [1, C, h, w] in fp32 on the CPU."""
    pixels = (rows.permute(2, 0, 1)[None] * 2 - 1).to(vae.device, vae.dtype, memory_format=torch.channels_last)
    return vae.encode(pixels).latent_dist.mean.float().cpu() * vae.config.scaling_factor
