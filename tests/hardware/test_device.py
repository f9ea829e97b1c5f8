import platform
import resource

import numpy as np
import psutil
import pytest
import torch

from linfusion_cli.core.errors import Unavailable, UsageError
from linfusion_cli.hardware import device, memory

MIB = 1 << 20


def test_auto_is_the_best_there_is():
    assert device.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_an_unknown_device_is_usage_and_an_absent_one_unavailable():
    for name in ("gpu", "mps", "cuda:x", "", "cuda:-1", "cuda:12345678901"):
        with pytest.raises(UsageError):
            device.pick_device(name)
    for name in ("cuda:99", "cuda:200"):
        with pytest.raises(Unavailable, match=name):
            device.pick_device(name)


def test_a_cpu_runs_in_float32_only():
    cpu = torch.device("cpu")
    assert device.pick_dtype("auto", cpu) == device.pick_vae_dtype("auto", cpu) == torch.float32
    with pytest.raises(UsageError, match="bfloat16"):
        device.pick_dtype("bfloat16", cpu)
    assert device.pick_dtype("auto", torch.device("cuda")) == torch.float16


@pytest.mark.skipif(not device.forgets_peaks(), reason="this kernel does not forget a process's peak memory")
def test_a_peak_is_that_of_its_own_stretch_of_work():
    cpu = torch.device("cpu")
    device.free_memory(cpu)  # else the array may lie in memory that earlier tests left resident
    before = device.PeakMemory(cpu).host_bytes()
    peak = device.PeakMemory(cpu)
    big = np.ones(256 * MIB, np.uint8)
    assert peak.host_bytes() - before > 200 * MIB
    del big
    device.free_memory(cpu)  # as between stages: a large hole in the heap serves large arrays, and keeps their pages
    after = device.PeakMemory(cpu)
    assert after.host_bytes() - before < 100 * MIB and after.device_bytes() is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory and gives it back asked")
def test_freed_memory_that_the_allocator_kept_goes_back():
    raise_mmap_threshold = np.ones(31 * MIB, np.uint8)  # glibc serves blocks of a size once freed from its heap
    del raise_mmap_threshold
    blocks = [np.ones(30 * MIB, np.uint8) for _ in range(10)]
    pins = [bytearray(50_000) for _ in range(100)]  # behind them on the heap, so that its end cannot shrink
    full = psutil.Process().memory_info().rss
    del blocks
    device.free_memory(torch.device("cpu"))
    assert full - psutil.Process().memory_info().rss > 250 * MIB and pins


@pytest.mark.parametrize("refusal", ["no clear_refs", "no VmHWM"])
def test_where_no_peak_is_forgotten_it_is_the_one_since_the_start(refusal, tmp_path, monkeypatch):
    """And a report says so: containers may refuse the reset, and some kernels keep no VmHWM."""
    monkeypatch.setattr(memory, "PROC_SELF", tmp_path / "missing" if refusal == "no clear_refs" else tmp_path)
    big = np.ones(64 * MIB, np.uint8)
    peak = device.PeakMemory(torch.device("cpu"))
    del big
    assert peak.host_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > 64 * MIB
    assert device.describe(torch.device("cpu"))["host_peaks_of"] == "process"
