"""Small random VAEs, which tests must not change."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from tests.support.small_models import small_vae


def ready(vae, dtype=torch.float32):
    return vae.eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)


def deep_vae(dtype=torch.float32) -> AutoencoderKL:
    """Of SDXL's depth, with levels of different width: shortcuts have layers."""
    torch.manual_seed(1)
    return ready(small_vae((4, 8, 12, 12), layers_per_block=2, groups=2), dtype)


@pytest.fixture(scope="session")
def vae():
    torch.manual_seed(0)
    return ready(small_vae())


@pytest.fixture(scope="session")
def deep():
    return deep_vae()


@pytest.fixture(scope="session")
def tiny():
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    return ready(AutoencoderTiny(**widths))
