"""What a plan has to get by with: a device, its speed, and the memory that may be used."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linfusion_cli.core.errors import OutOfMemoryBudget, UsageError
from linfusion_cli.core.units import format_bytes, format_seconds
from linfusion_cli.hardware import device as machine
from linfusion_cli.hardware.allocator import Segments, segments
from linfusion_cli.hardware.cuda import is_cuda
from linfusion_cli.hardware.diagnosis import nvidia_is_here, why_no_device
from linfusion_cli.planning.speed import Speed, measured
from linfusion_cli.settings.request import ImageRequest

SHARE_OF_FREE = 0.9  # what is taken of the memory that is free now, where nothing else is said
SHORT_SEC = 60.0  # of a run that nobody would want a GPU for
ON_CPU = "This runs on the CPU and takes about {}: {}."


@dataclass(frozen=True)
class Machine:
    """`host_bytes` counts the whole process, `device_bytes` what torch has on the card; None without one."""

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    host_bytes: int
    device_bytes: int | None
    resident_bytes: int  # of this process, before any model is loaded
    speed: Speed
    vae_speed: Speed
    segments: Segments = "expandable"  # of torch's allocator on the card
    no_gpu: tuple[str, str] | None = None  # why `auto` is the CPU, as a clause, and what to do, as a sentence


def survey(request: ImageRequest, kept_bytes: int = 0) -> Machine:
    """This machine as `request` wants to use it; raises UsageError, Unavailable, or DoesNotFit for a card that is full.

    `kept_bytes` of the host's memory hold models from a job before: they are used again, or go first.
    """
    device = machine.pick_device(request.device)
    dtype, vae_dtype = (pick(request.dtype, device) for pick in (machine.pick_dtype, machine.pick_vae_dtype))
    if request.vram is not None and not is_cuda(device):
        raise UsageError(
            f"--vram {format_bytes(request.vram)} needs a GPU, and this runs on {device}.", "Use --ram.", "vram"
        )
    speed, vae_speed = speeds(device, dtype, vae_dtype)
    resident = max(0, machine.resident_bytes() - kept_bytes)  # with what a card's driver takes of it
    host = request.ram or resident + int(SHARE_OF_FREE * (machine.free_host_bytes() + kept_bytes))
    budget = device_budget(request, device)
    no_gpu = why_no_device() if request.device == "auto" and not is_cuda(device) else None
    return Machine(device, dtype, vae_dtype, host, budget, resident, speed, vae_speed, segments(), no_gpu)


def speeds(device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype) -> tuple[Speed, Speed]:
    """How fast `device` is in both formats; raises DoesNotFit where it has no room even to measure that."""
    try:
        return measured(device, dtype), measured(device, vae_dtype)
    except (RuntimeError, MemoryError) as error:
        if not (is_cuda(device) and machine.is_out_of_memory(error)):
            raise
        reason = f"{device} is full: {format_bytes(machine.free_device_bytes(device))} of its memory are free."
        raise OutOfMemoryBudget(reason, "End what uses it (see `nvidia-smi`), or use --device cpu.") from error


def cpu_notice(machine: Machine, seconds: float) -> str | None:
    """Why a run of so many seconds is on the CPU although nobody asked for that, in one line; None if it is not.

    Where the machine has no GPU that is known of, a run shorter than SHORT_SEC is not worth the line.
    """
    if machine.no_gpu is None:
        return None
    reason, hint = machine.no_gpu
    if seconds < SHORT_SEC and not hint and not nvidia_is_here():
        return None
    return f"{ON_CPU.format(format_seconds(seconds), reason)} {hint}".strip()


def device_budget(request: ImageRequest, device: torch.device) -> int | None:
    """The bytes that may be used of a card."""
    if not is_cuda(device):
        return None
    return request.vram or int(SHARE_OF_FREE * machine.free_device_bytes(device))
