"""Strips on a CUDA device: the result of the plain forward pass for every place of feature maps, in less memory."""

import pytest
import torch

from linfusion_cli.hardware.cuda import limit_device_memory
from linfusion_cli.mixers.linear.mount import mount_modules
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import StripContext, StripSize
from linfusion_cli.strips.storage import PLACES, Storage
from linfusion_cli.unet.forward import UNetInputs, strip_forward
from tools.bench.shapes import build_linear_attentions, build_random_inputs, build_sdxl_unet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def unet():
    torch.manual_seed(0)
    with torch.device("cuda"):
        network = build_sdxl_unet(5).eval().requires_grad_(False)
        with mount_modules(network, build_linear_attentions(network)):
            yield network


def run_in_strips(unet, latents, condition, place: str) -> torch.Tensor:
    run = StripContext(StripSize(8, 1024), Storage(place, torch.device("cuda"), unet.dtype), SingleDevice())
    return strip_forward(unet, run, latents, torch.tensor(500), condition)


@torch.inference_mode()
def run_plain(unet, latents, condition) -> torch.Tensor:
    return unet(latents, torch.tensor(500), condition.text, added_cond_kwargs=condition.added).sample


@pytest.mark.parametrize("place", PLACES)
def test_strips_equal_the_plain_forward_repeatedly(unet, place):
    """In fp64, in which a late or early copy is visible; repeated, because races are not deterministic."""
    unet.double()
    latents, condition = torch.randn(1, 4, 101, 77, dtype=torch.float64, device="cuda"), build_random_inputs(unet)
    expected = run_plain(unet, latents, condition)
    for _ in range(5):
        output = run_in_strips(unet, latents, condition, place)
        assert ((output - expected).norm() / expected.norm()).item() <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_accurate_as_the_plain_forward(unet, dtype):
    latents, condition = torch.randn(1, 4, 128, 128, device="cuda"), build_random_inputs(unet)
    exact = run_plain(unet, latents, condition)
    unet.to(dtype)
    half = UNetInputs(condition.text.to(dtype), {name: value.to(dtype) for name, value in condition.added.items()})
    errors = [
        ((output.float() - exact).norm() / exact.norm()).item()
        for output in (run_in_strips(unet, latents.to(dtype), half, "device"), run_plain(unet, latents.to(dtype), half))
    ]
    assert errors[0] <= 1.5 * errors[1]


def test_memory_depends_on_the_place_of_maps(unet):
    latents, condition = torch.randn(1, 4, 512, 512, device="cuda"), build_random_inputs(unet)
    peaks = []
    for place in PLACES:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_in_strips(unet, latents, condition, place)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] > 1.5 * peaks[1] > 2 * peaks[2]


def test_the_memory_budget_is_enforced():
    device = torch.device("cuda")
    limit_device_memory(device, 1 << 30)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(2 << 30, dtype=torch.uint8, device=device)
    finally:
        limit_device_memory(device, None)
    assert torch.empty(2 << 30, dtype=torch.uint8, device=device).nbytes == 2 << 30
