"""Small random VAEs; tests must not modify the fixtures."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from tests.support.small_models import build_small_vae


def prepare(vae, dtype=torch.float32):
    """Freeze a VAE and convert it to `dtype` and channels-last memory."""
    return vae.eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)


def deep_vae(dtype=torch.float32) -> AutoencoderKL:
    """Return a VAE as deep as SDXL's, with levels of different widths: shortcuts have a convolution."""
    torch.manual_seed(1)
    return prepare(build_small_vae((4, 8, 12, 12), layers_per_block=2, groups=2), dtype)


@pytest.fixture(scope="session")
def vae():
    """A small VAE."""
    torch.manual_seed(0)
    return prepare(build_small_vae())


@pytest.fixture(scope="session")
def deep():
    """A VAE as deep as SDXL's."""
    return deep_vae()


@pytest.fixture(scope="session")
def tiny():
    """A tiny VAE."""
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    return prepare(AutoencoderTiny(**widths))
