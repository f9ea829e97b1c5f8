"""Choose the machine of `linfusion plan`: this one, or this one with a GPU that it does not have."""

from __future__ import annotations

import torch

from linfusion_cli.core.errors import Unavailable, UsageError
from linfusion_cli.core.units import format_bytes_rounded_up
from linfusion_cli.hardware.device import (
    build_unavailable_error,
    check_device_name,
    is_missing_gpu,
    pick_dtype,
    pick_vae_dtype,
)
from linfusion_cli.hardware.host_memory import resident_bytes
from linfusion_cli.planning.gpus import UNKNOWN_GPU, Gpu
from linfusion_cli.planning.machine import Machine, compute_host_budget, inspect_machine
from linfusion_cli.planning.speed import Speed, compute_speed
from linfusion_cli.settings.request import Request

HINT = "Add --vram 24GiB or --gpu rtx4090 to plan for a GPU that this machine does not have."


def choose_machine(request: Request, gpu: Gpu | None) -> Machine:
    """Return the machine to plan for: with `gpu` if one is given, or with any GPU of --vram if --device is absent here.

    Raise the errors of `inspect_machine`, and UsageError for a budget or dtype that `gpu` does not allow.
    """
    check_device_name(request.execution.device)
    if gpu is not None:
        return assume_gpu(request, gpu)
    if not is_missing_gpu(request.execution.device):
        return inspect_machine(request)
    if request.execution.vram is not None:
        return assume_gpu(request, UNKNOWN_GPU)
    error = build_unavailable_error(request.execution.device)
    raise Unavailable(error.message, f"{error.hint} {HINT}")


def assume_gpu(request: Request, gpu: Gpu) -> Machine:
    """Return this machine with `gpu` and the budget of --vram; raise UsageError if the GPU does not allow it.

    The host budget is that of this machine. No GPU is used.
    """
    assert request.execution.vram is not None
    if gpu is not UNKNOWN_GPU and request.execution.vram > gpu.memory_bytes:
        reason = f"--vram {format_bytes_rounded_up(request.execution.vram)} is more than the {gpu.name} has."
        raise UsageError(reason, f"Use at most {gpu.memory_gib}GiB.", "vram")
    if request.dtype == "bfloat16" and not gpu.has_bfloat16:
        reason = f"--dtype bfloat16 is not supported by the {gpu.name}."
        raise UsageError(reason, "Use --dtype float16 or float32.", "dtype")
    device = torch.device("cuda", 0)
    dtype = pick_dtype(request.dtype, device, gpu.has_bfloat16)
    vae_dtype = pick_vae_dtype(request.dtype, device, gpu.has_bfloat16)
    resident = resident_bytes()
    return Machine(
        device,
        dtype,
        vae_dtype,
        compute_host_budget(request, resident),
        request.execution.vram,
        resident,
        estimate_speed(gpu, dtype),
        estimate_speed(gpu, vae_dtype),
        copy_bytes_per_sec=gpu.copy_bytes_per_sec,
        assumed_gpu=gpu,
    )


def estimate_speed(gpu: Gpu, dtype: torch.dtype) -> Speed:
    """Return the rates of `gpu` for `dtype`, from its data sheet."""
    tflops = gpu.single_tflops if dtype == torch.float32 else gpu.half_tflops
    return compute_speed(1e12 * tflops, 1e9 * gpu.memory_gb_per_sec, dtype.itemsize)
