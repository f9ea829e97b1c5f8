"""Measure the peak memory of a stage, and release memory between stages."""

from __future__ import annotations

import gc
import resource
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from linfusion_cli.hardware.cuda import is_cuda, synchronize
from linfusion_cli.hardware.host_memory import peak_resident_bytes, reset_host_peak, trim_heap
from linfusion_cli.hardware.torch_errors import is_out_of_memory

if TYPE_CHECKING:
    import torch


@dataclass
class PeakMemory:
    """Measure peak memory from the creation of this object on.

    `device` is None before the device is chosen and torch is imported.
    """

    device: torch.device | None

    def __post_init__(self) -> None:
        if is_cuda(self.device):
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        self._is_reset = reset_host_peak()

    def host_bytes(self) -> int:
        """Return the peak resident memory since the start, or of the whole process if the kernel cannot reset it."""
        peak = peak_resident_bytes() if self._is_reset else None
        return peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def device_bytes(self) -> int | None:
        """Return the peak of the memory that torch reserved on the GPU, or None without a GPU."""
        if not is_cuda(self.device):
            return None
        import torch

        return torch.cuda.max_memory_reserved(self.device)


def release_memory(device: torch.device | None) -> None:
    """Release unused memory after a stage: reference cycles, free heap memory, and torch's cache on the GPU.

    Waits for the GPU first, because memory that queued work still uses cannot be released. Asynchronous errors of that
    work are raised, except for out-of-memory errors, after which the release is all the more necessary.
    """
    gc.collect()
    trim_heap()
    if not is_cuda(device):
        return
    import torch

    for release in (partial(synchronize, device), torch.cuda.empty_cache):
        try:
            release()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
