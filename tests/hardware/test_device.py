import platform
import resource

import numpy as np
import psutil
import pytest
import torch

from linfusion_cli.core.errors import Unavailable, UsageError
from linfusion_cli.hardware import device, host_memory
from linfusion_cli.hardware.peak import PeakMemory, release_memory
from linfusion_cli.hardware.versions import describe_machine

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


@pytest.mark.skipif(not host_memory.reset_host_peak(), reason="this kernel cannot reset the peak memory of a process")
def test_a_peak_is_that_of_its_own_stretch_of_work():
    cpu = torch.device("cpu")
    release_memory(cpu)  # otherwise the array can reuse resident memory of earlier tests
    before = PeakMemory(cpu).host_bytes()
    peak = PeakMemory(cpu)
    big = np.ones(256 * MIB, np.uint8)
    assert peak.host_bytes() - before > 200 * MIB
    del big
    release_memory(cpu)  # as between stages: freed heap memory stays resident
    after = PeakMemory(cpu)
    assert after.host_bytes() - before < 100 * MIB and after.device_bytes() is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_freed_memory_that_the_allocator_kept_goes_back():
    raise_mmap_threshold = np.ones(31 * MIB, np.uint8)  # glibc then allocates such blocks on the heap
    del raise_mmap_threshold
    blocks = [np.ones(30 * MIB, np.uint8) for _ in range(10)]
    pins = [bytearray(50_000) for _ in range(100)]  # after the blocks on the heap: its end cannot shrink
    full = psutil.Process().memory_info().rss
    del blocks
    release_memory(torch.device("cpu"))
    assert full - psutil.Process().memory_info().rss > 250 * MIB and pins


@pytest.mark.parametrize("refusal", ["no clear_refs", "no VmHWM"])
def test_where_no_peak_is_forgotten_it_is_the_one_since_the_start(refusal, tmp_path, monkeypatch):
    """The report states it: containers can forbid the reset, and some kernels have no VmHWM."""
    monkeypatch.setattr(host_memory, "PROC_SELF", tmp_path / "missing" if refusal == "no clear_refs" else tmp_path)
    big = np.ones(64 * MIB, np.uint8)
    peak = PeakMemory(torch.device("cpu"))
    del big
    assert peak.host_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > 64 * MIB
    assert describe_machine(torch.device("cpu"))["host_peaks_of"] == "process"
