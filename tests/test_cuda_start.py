"""What a run asks of a CUDA device before it loads a model: torch's own Python code, on a stubbed driver."""

from types import SimpleNamespace

import pytest
import torch

from linfusion_cli import device
from linfusion_cli.errors import Unavailable, UsageError
from linfusion_cli.geometry import Size
from linfusion_cli.planning import machine
from linfusion_cli.planning.speed import Speed
from linfusion_cli.request import GenerateRequest

GIB = 1 << 30
DEVICES, TOTAL_BYTES, FREE_BYTES = 2, 24 * GIB, 20 * GIB


@pytest.fixture
def fractions(monkeypatch) -> list[tuple[float, int]]:
    """The memory limits that reached the driver of a machine with two cards: fraction and index of the device.

    Only what calls the driver is replaced.
    """
    limits: list[tuple[float, int]] = []
    properties = SimpleNamespace(total_memory=TOTAL_BYTES, major=8, minor=9, name="A card")
    for module in (torch.cuda, torch.cuda.memory):
        monkeypatch.setattr(module, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: DEVICES)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda index: 0)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda index: 0)
    runtime = SimpleNamespace(cudaMemGetInfo=lambda index: (FREE_BYTES, TOTAL_BYTES))
    monkeypatch.setattr(torch.cuda.memory, "cudart", lambda: runtime, raising=False)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda share, index: limits.append((share, index)), raising=False
    )
    monkeypatch.setattr(torch._C, "_cuda_resetPeakMemoryStats", lambda index: None, raising=False)
    return limits


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
@pytest.mark.parametrize(("vram", "share"), [(None, 1.0), (8 * GIB, 1 / 3), (80 * GIB, 1.0)])
def test_a_run_starts_on_every_name_of_a_device(monkeypatch, fractions, name, index, vram, share):
    monkeypatch.setattr(machine, "measured", lambda device, dtype: Speed(1e12, 1e10))  # which runs kernels
    request = GenerateRequest(prompt="a hill", size=Size(64, 64), output="a.png", model="demo", device=name, vram=vram)
    found = machine.survey(request)
    device.limit_device_memory(found.device, request.vram)
    device.PeakMemory(found.device)
    assert found.device == torch.device("cuda", index)
    assert (found.dtype, found.vae_dtype) == (torch.float16, torch.bfloat16)
    assert found.device_bytes == (vram or int(machine.SHARE_OF_FREE * FREE_BYTES))
    assert fractions == [(pytest.approx(share), index)]


def test_a_device_beyond_the_last_is_unavailable(fractions):
    with pytest.raises(Unavailable, match=f"cuda:{DEVICES} is not on this machine"):
        device.pick_device(f"cuda:{DEVICES}")


@pytest.mark.parametrize("name", ["cuda:01", "cuda:00", "cuda:+1", "cuda: 1", "cuda:1 ", "cuda:", "cuda:٣", "CUDA:1"])
def test_a_name_that_is_not_written_as_torch_writes_it_is_usage(fractions, name):
    with pytest.raises(UsageError) as refused:
        device.pick_device(name)
    assert refused.value.setting == "device"
