"""What a plan has to get by with: a device, its speed, and the memory that may be used."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linfusion_cli import device as machine
from linfusion_cli.errors import UsageError
from linfusion_cli.planning.speed import Speed, measured
from linfusion_cli.request import PictureRequest
from linfusion_cli.units import format_bytes

SHARE_OF_FREE = 0.9  # what is taken of the memory that is free now, where nothing else is said


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


def survey(request: PictureRequest, kept_bytes: int = 0) -> Machine:
    """This machine as `request` wants to use it; raises UsageError or Unavailable.

    `kept_bytes` of the host's memory hold models from a job before: they are used again, or go first.
    """
    device = machine.pick_device(request.device)
    dtype, vae_dtype = (pick(request.dtype, device) for pick in (machine.pick_dtype, machine.pick_vae_dtype))
    if request.vram is not None and device.type != "cuda":
        raise UsageError(
            f"--vram {format_bytes(request.vram)} needs a GPU, and this runs on {device}.", "Use --ram.", "vram"
        )
    speed = measured(device, dtype)
    vae_speed = speed if vae_dtype == dtype else measured(device, vae_dtype)
    resident = max(0, machine.resident_bytes() - kept_bytes)  # with what a card's driver takes of it
    host = request.ram or resident + int(SHARE_OF_FREE * (machine.free_host_bytes() + kept_bytes))
    return Machine(device, dtype, vae_dtype, host, device_budget(request, device), resident, speed, vae_speed)


def device_budget(request: PictureRequest, device: torch.device) -> int | None:
    """The bytes that may be used of a card."""
    if device.type != "cuda":
        return None
    return request.vram or int(SHARE_OF_FREE * machine.free_device_bytes(device))
