"""Strips on a CUDA device: the plain forward's result from wherever maps wait, in less memory."""

import pytest
import torch

from linfusion_cli.hardware.device import limit_device_memory
from linfusion_cli.mixers.linear.mount import mounted
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import Strips, StripSize
from linfusion_cli.strips.storage import PLACES, Storage
from linfusion_cli.unet.forward import UNetInputs, strip_forward
from tools.bench.shapes import linear_attentions, random_condition, sdxl_unet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def unet():
    torch.manual_seed(0)
    with torch.device("cuda"):
        network = sdxl_unet(5).eval().requires_grad_(False)
        with mounted(network, linear_attentions(network)):
            yield network


def forward(unet, latents, condition, place: str) -> torch.Tensor:
    run = Strips(StripSize(8, 1024), Storage(place, torch.device("cuda"), unet.dtype), SingleDevice())
    return strip_forward(unet, run, latents, torch.tensor(500), condition)


@torch.inference_mode()
def plain(unet, latents, condition) -> torch.Tensor:
    return unet(latents, torch.tensor(500), condition.text, added_cond_kwargs=condition.added).sample


@pytest.mark.parametrize("place", PLACES)
def test_strips_equal_the_plain_forward_again_and_again(unet, place):
    """In fp64, where a copy that comes too late or too early shows; several times, as a race does not always."""
    unet.double()
    latents, condition = torch.randn(1, 4, 101, 77, dtype=torch.float64, device="cuda"), random_condition(unet)
    expected = plain(unet, latents, condition)
    for _ in range(5):
        found = forward(unet, latents, condition, place)
        assert ((found - expected).norm() / expected.norm()).item() <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_the_plain_forward_s(unet, dtype):
    latents, condition = torch.randn(1, 4, 128, 128, device="cuda"), random_condition(unet)
    exact = plain(unet, latents, condition)
    unet.to(dtype)
    half = UNetInputs(condition.text.to(dtype), {name: value.to(dtype) for name, value in condition.added.items()})
    errors = [
        ((found.float() - exact).norm() / exact.norm()).item()
        for found in (forward(unet, latents.to(dtype), half, "device"), plain(unet, latents.to(dtype), half))
    ]
    assert errors[0] <= 1.5 * errors[1]


def test_memory_follows_where_maps_wait(unet):
    latents, condition = torch.randn(1, 4, 512, 512, device="cuda"), random_condition(unet)
    peaks = []
    for place in PLACES:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward(unet, latents, condition, place)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] > 1.5 * peaks[1] > 2 * peaks[2]


def test_a_budget_is_a_limit():
    device = torch.device("cuda")
    limit_device_memory(device, 1 << 30)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(2 << 30, dtype=torch.uint8, device=device)
    finally:
        limit_device_memory(device, None)
    assert torch.empty(2 << 30, dtype=torch.uint8, device=device).nbytes == 2 << 30
