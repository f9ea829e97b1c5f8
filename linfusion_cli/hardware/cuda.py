"""Query and configure a CUDA or ROCm device: dtypes, memory and its limit, fp32 precision."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

from linfusion_cli.hardware import allocator

if TYPE_CHECKING:
    import torch

# cuBLAS and cuDNN need more than this for a handle and its workspace, which they allocate outside torch's allocator.
MIN_LIBRARY_BYTES = 512 << 20
# Errors of cudaMemGetInfo with the drivers of some virtual GPUs and in some containers.
MEMORY_QUERY_UNSUPPORTED = re.compile(r"(?:CUDA|HIP) error: (?:operation not (?:supported|permitted)|invalid argument)")
# torch's warnings while it starts, each of several lines; where they matter, linfusion reports them in one.
START_WARNINGS = (
    r"CUDA initialization: ",
    r"HIP initialization: ",
    r"Can't (?:initialize NVML|get nvml device count|get device handle|get device UUID|initialize amdsmi)",
    r"Found GPU\d+ ",
    r"\s*.* with CUDA capability sm_",
    r".*PyTorch was compiled with an unknown compute capability",
)


@contextmanager
def suppress_start_warnings() -> Iterator[None]:
    """Suppress torch's warnings about devices and drivers in this block; the caller reports the problem itself."""
    with warnings.catch_warnings():
        for text in START_WARNINGS:
            warnings.filterwarnings("ignore", message=text)
        yield


def is_cuda(device: torch.device | None) -> TypeGuard[torch.device]:
    """Return whether this is a CUDA or ROCm device."""
    return device is not None and device.type == "cuda"


def platform_name() -> str | None:
    """Return the GPU platform of this torch build, "CUDA 12.8" or "ROCm 6.4", or None for a CPU build."""
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else None


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished all queued work; raises its asynchronous errors."""
    import torch

    if is_cuda(device):
        torch.cuda.synchronize(device)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a GPU supports bfloat16 natively; torch's emulation is many times slower."""
    import torch

    with torch.cuda.device(device):  # torch checks the current device only
        return torch.cuda.is_bf16_supported(including_emulation=False)


def total_bytes(device: torch.device) -> int:
    """Return the memory of a GPU or MIG instance."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory


def free_device_bytes(device: torch.device) -> int:
    """Return the GPU memory that this process can still allocate, including memory that torch has cached.

    If the driver does not report free memory, all memory that this process has not reserved counts as free.
    """
    import torch

    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    try:
        free, _ = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        if not MEMORY_QUERY_UNSUPPORTED.match(str(error)):
            raise
        free = total_bytes(device) - reserved
    allowed = int(allocator.memory_fraction() * total_bytes(device)) - allocated
    return max(0, min(free + reserved - allocated, allowed))


def limit_device_memory(device: torch.device, budget_bytes: int | None) -> None:
    """Limit the memory that torch reserves on a GPU; None removes the limit.

    A smaller fraction in the user's allocator options stays in effect.
    """
    import torch

    if is_cuda(device):
        total = total_bytes(device)
        wanted = (total if budget_bytes is None else budget_bytes) / total
        torch.cuda.set_per_process_memory_fraction(min(allocator.memory_fraction(), wanted), device)


def is_any_gpu_full() -> bool:
    """Return whether a GPU used by this process has too little free memory for library handles and workspaces."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    # A memory query creates a context on the GPU, which takes memory: query only those in use.
    used = [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(index)]
    try:
        return any(torch.cuda.mem_get_info(index)[0] < MIN_LIBRARY_BYTES for index in used)
    except RuntimeError:  # not supported
        return False


def forbid_tf32() -> None:
    """Compute fp32 matrix products and convolutions in full precision.

    By default torch uses TF32 in convolutions, with 10 of 23 mantissa bits. This sets torch's older flags, which exist
    in all releases: once the newer ones are set, reading the older ones fails.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
