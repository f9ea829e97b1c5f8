"""A stub of the CUDA driver below torch's Python code, with failures on demand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # now: with the stub in place, it would import more modules

from linfusion_cli.hardware import device

GIB = 1 << 30
TOTAL_BYTES, FREE_BYTES = 24 * GIB, 20 * GIB


class StubDriver:
    """The driver of a machine with `count` GPUs; `limits` and `ran` record the calls.

    Replaces only the functions of torch that call the driver.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 2):
        self._monkeypatch, self.count = monkeypatch, count
        self.limits: list[tuple[float, int]] = []
        self.ran: list[torch.device] = []
        self.reserved, self.allocated, self.free = 0, 0, FREE_BYTES
        self.has_bf16 = True
        self.failures: dict[str, Exception] = {}  # keys: "count", "init", "kernel", "synchronize", "free"
        self._install()

    def fail(self, **failures: Exception) -> None:
        """Let these calls raise the given errors from now on."""
        self.failures |= failures

    def built_for(self, cuda: str | None = None, hip: str | None = None) -> None:
        """Simulate a torch build for this platform, or for the CPU."""
        self._monkeypatch.setattr(torch.version, "cuda", cuda)
        self._monkeypatch.setattr(torch.version, "hip", hip)

    def _answer(self, name: str, value: object) -> object:
        if name in self.failures:
            raise self.failures[name]
        return value

    def _device_count(self) -> int:
        """Like torch: warn and return 0 if the driver does not start."""
        if "count" in self.failures:
            import warnings

            warnings.warn(f"CUDA initialization: {self.failures['count']}", stacklevel=2)
            return 0
        return self.count

    def _run(self, where: torch.device) -> None:
        self._answer("kernel", None)
        self.ran.append(where)

    def _install(self) -> None:
        put, core = self._monkeypatch.setattr, torch._C
        properties = SimpleNamespace(total_memory=TOTAL_BYTES, major=8, minor=9, name="A card")
        runtime = SimpleNamespace(cudaMemGetInfo=lambda index: (self._answer("free", self.free), TOTAL_BYTES))
        self.built_for(cuda="12.8")
        for module in (torch.cuda, torch.cuda.memory):
            put(module, "_lazy_init", lambda: self._answer("init", None))
        put(torch.cuda, "is_initialized", lambda: True)
        put(torch.cuda, "_device_count_nvml", lambda: -1)
        put(torch.cuda, "_cached_device_count", None)
        put(core, "_cuda_getDeviceCount", self._device_count, raising=False)
        put(torch.cuda, "get_device_properties", lambda device=None: properties)
        put(torch.cuda, "is_bf16_supported", lambda including_emulation=True: self.has_bf16 or including_emulation)
        put(torch.cuda, "current_device", lambda: 0)
        put(torch.cuda, "memory_reserved", lambda device: self.reserved)
        put(torch.cuda, "memory_allocated", lambda device: self.allocated)
        put(torch.cuda, "_exchange_device", lambda index: 0)
        put(torch.cuda, "_maybe_exchange_device", lambda index: 0)
        put(torch.cuda.memory, "cudart", lambda: runtime, raising=False)
        put(torch.cuda, "cudart", lambda: runtime)
        put(core, "_cuda_synchronize", lambda: self._answer("synchronize", None), raising=False)
        put(core, "_cuda_setMemoryFraction", lambda share, index: self.limits.append((share, index)), raising=False)
        put(core, "_cuda_resetPeakMemoryStats", lambda index: None, raising=False)
        put(device, "run_kernel", self._run)
