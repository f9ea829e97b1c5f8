"""Latents -> rows of pixels, strip by strip: overlapping windows of the decoder's native size, blended."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from linfusion_cli.vae.tiles import Windows


def decode_rows(vae: AutoencoderKL, latents: Tensor, window_lat: int) -> Iterator[Tensor]:
    """Latents [1, C, h, w] -> final rows [rows, W, 3] in fp32 on the CPU, 0 to 1, top to bottom, each once.

    Only one strip of windows is in memory: what a strip shares with the next is carried over until that has been added.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    vertical = Windows.over(latents.shape[-2], window_lat)
    rows = vertical.scaled(factor)
    carried = torch.zeros(0)
    for i, (top, bottom) in enumerate(vertical.spans):
        strip = _decode_strip(vae, latents[:, :, top:bottom], window_lat, factor)
        strip *= rows.weights(i)[:, None, None]
        if i > 0:
            strip[: len(carried)] += carried
        finished = rows.final(i) - rows.spans[i][0]
        carried = strip[finished:].clone()
        yield strip[:finished].clamp_(0, 1)


def _decode_strip(vae: AutoencoderKL, latents: Tensor, window_lat: int, factor: int) -> Tensor:
    """One strip of latents [1, C, h, w] -> [H, W, 3], its windows blended from left to right."""
    horizontal = Windows.over(latents.shape[-1], window_lat)
    columns = horizontal.scaled(factor)
    strip = torch.zeros(latents.shape[-2] * factor, latents.shape[-1] * factor, 3)
    for i, (left, right) in enumerate(horizontal.spans):
        pixels = _decode_window(vae, latents[..., left:right])
        strip[:, slice(*columns.spans[i])] += pixels * columns.weights(i)[None, :, None]
    return strip


@torch.inference_mode()
def _decode_window(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """One window of latents [1, C, h, w] -> pixels [H, W, 3] in fp32 on the CPU."""
    scaled = latents.to(vae.device, vae.dtype, memory_format=torch.channels_last) / vae.config.scaling_factor
    pixels = vae.decode(scaled, return_dict=False)[0]
    return (pixels[0].permute(1, 2, 0).float() / 2 + 0.5).cpu()
