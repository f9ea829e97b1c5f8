"""Determine the device, its speed, and the memory budget that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linfusion_cli.core.errors import OutOfMemoryBudget, UsageError
from linfusion_cli.core.units import format_bytes, format_seconds
from linfusion_cli.hardware.allocator import Segments, detect_segments
from linfusion_cli.hardware.cuda import free_device_bytes, is_cuda
from linfusion_cli.hardware.device import pick_device, pick_dtype, pick_vae_dtype
from linfusion_cli.hardware.host_memory import free_host_bytes, resident_bytes
from linfusion_cli.hardware.no_gpu import explain_no_gpu, has_nvidia_gpu
from linfusion_cli.hardware.torch_errors import is_out_of_memory
from linfusion_cli.planning.gpus import PCIE_4, Gpu
from linfusion_cli.planning.speed import Speed, measure_speed
from linfusion_cli.settings.request import Request

FREE_MEMORY_SHARE = 0.9  # default budget, as a share of the free memory
MIN_NOTICE_SEC = 60.0  # shorter runs do not need a GPU
CPU_NOTICE = "This runs on the CPU and takes about {}: {}."


@dataclass(frozen=True)
class Machine:
    """A device with memory budgets: `host_bytes` for the process, and `device_bytes` for torch on a GPU, if any."""

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    host_bytes: int
    device_bytes: int | None
    resident_bytes: int  # of this process, before any model is loaded
    speed: Speed
    vae_speed: Speed
    segments: Segments = "expandable"  # of torch's allocator on the card
    no_gpu: tuple[str, str] | None = None  # reason (clause) and hint (sentence) if `auto` selected the CPU
    copy_bytes_per_sec: float = PCIE_4  # between pinned host memory and the GPU
    assumed_gpu: Gpu | None = None  # of a plan for a GPU that this machine does not have


def inspect_machine(request: Request, cached_model_bytes: int = 0) -> Machine:
    """Return the machine as `request` uses it.

    `cached_model_bytes` is the host memory of models from previous jobs: they are reused, or freed first.
    Raise UsageError, Unavailable, or OutOfMemoryBudget if the GPU is full.
    """
    device = pick_device(request.execution.device)
    dtype, vae_dtype = (pick(request.dtype, device) for pick in (pick_dtype, pick_vae_dtype))
    if request.execution.vram is not None and not is_cuda(device):
        raise UsageError(
            f"--vram {format_bytes(request.execution.vram)} needs a GPU; the device is {device}.", "Use --ram.", "vram"
        )
    speed, vae_speed = measure_speeds(device, dtype, vae_dtype)
    resident = max(0, resident_bytes() - cached_model_bytes)  # includes the GPU driver's memory
    host = compute_host_budget(request, resident, cached_model_bytes)
    budget = compute_device_budget(request, device)
    no_gpu = explain_no_gpu() if request.execution.device == "auto" and not is_cuda(device) else None
    return Machine(device, dtype, vae_dtype, host, budget, resident, speed, vae_speed, detect_segments(), no_gpu)


def measure_speeds(device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype) -> tuple[Speed, Speed]:
    """Measure `device` with both dtypes. Raise OutOfMemoryBudget if it has no memory for that."""
    try:
        return measure_speed(device, dtype), measure_speed(device, vae_dtype)
    except (RuntimeError, MemoryError) as error:
        if not (is_cuda(device) and is_out_of_memory(error)):
            raise
        reason = f"{device} is full: {format_bytes(free_device_bytes(device))} of its memory are free."
        raise OutOfMemoryBudget(
            reason, "Stop processes that use it (see `nvidia-smi`), or use --device cpu."
        ) from error


def build_cpu_notice(machine: Machine, seconds: float) -> str | None:
    """Return a notice that a run of `seconds` uses the CPU by default, and the reason. None if it does not.

    Runs shorter than MIN_NOTICE_SEC get no notice if the machine has no NVIDIA GPU.
    """
    if machine.no_gpu is None:
        return None
    reason, hint = machine.no_gpu
    if seconds < MIN_NOTICE_SEC and not hint and not has_nvidia_gpu():
        return None
    return f"{CPU_NOTICE.format(format_seconds(seconds), reason)} {hint}".strip()


def compute_host_budget(request: Request, resident: int, cached_model_bytes: int = 0) -> int:
    """Return the budget in bytes of host memory for a process with `resident` bytes before models are loaded."""
    return request.execution.ram or resident + int(FREE_MEMORY_SHARE * (free_host_bytes() + cached_model_bytes))


def compute_device_budget(request: Request, device: torch.device) -> int | None:
    """Return the budget in bytes of GPU memory, None if `device` is not a GPU."""
    if not is_cuda(device):
        return None
    return request.execution.vram or int(FREE_MEMORY_SHARE * free_device_bytes(device))
