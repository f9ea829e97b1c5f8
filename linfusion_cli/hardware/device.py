"""Choose and start the device of a run, and choose the dtypes."""

from __future__ import annotations

import os
import re
import warnings
from typing import TYPE_CHECKING

from linfusion_cli.core.errors import (
    DeviceFailed,
    LinfusionError,
    OutOfMemoryBudget,
    Unavailable,
    UsageError,
    first_line,
)
from linfusion_cli.hardware import allocator, no_gpu
from linfusion_cli.hardware.cuda import (
    has_bfloat16,
    is_cuda,
    synchronize,
)
from linfusion_cli.hardware.torch_errors import HINT_CHECK_DRIVER, HINT_GPU_BUSY, is_out_of_memory, translate_error

if TYPE_CHECKING:
    import torch

DEVICE_NAME = re.compile(r"auto|cpu|cuda(?::(0|[1-9][0-9]{0,8}))?")
HINT_USE_CPU = "Use --device cpu to run without a GPU."


def pick_device(name: str) -> torch.device:
    """Return the started device for `auto`, `cpu`, `cuda` or `cuda:N`.

    `auto` is the CPU only if torch finds no GPU. A GPU that does not start is an error, as the run would take days on
    the CPU. CUDA devices always have an index: `torch.cuda.set_per_process_memory_fraction` requires one.

    Raises UsageError for an unknown name, Unavailable for a device that does not exist, and the errors of
    `start_device`.
    """
    import torch

    check_device_name(name)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if is_missing_gpu(name):
        raise build_unavailable_error(name)
    device = torch.device("cuda", parse_index(name))
    start_device(device)
    return device


def check_device_name(name: str) -> None:
    """Raise UsageError unless `name` is `auto`, `cpu`, `cuda` or `cuda:N`."""
    if DEVICE_NAME.fullmatch(name) is None:
        raise UsageError(f"--device {name!r} is unknown.", "Use auto, cpu, cuda or cuda:N.", "device")


def parse_index(name: str) -> int:
    """Return the number of the GPU in a valid device name, by default 0."""
    match = DEVICE_NAME.fullmatch(name)
    return int(match[1] or 0) if match else 0


def is_missing_gpu(name: str) -> bool:
    """Return whether `name` is `cuda` or `cuda:N`, and torch does not find that GPU. Raise UsageError for bad names."""
    import torch

    check_device_name(name)
    # Compare the number itself: torch.device wraps large ones around.
    return name.startswith("cuda") and parse_index(name) >= torch.cuda.device_count()


def build_unavailable_error(name: str) -> Unavailable:
    """Return the error for a GPU that does not exist, with the reason."""
    import torch

    reason, hint = (no_gpu.describe_visible_gpus(), "") if torch.cuda.device_count() else no_gpu.explain_no_gpu()
    return Unavailable(f"--device {name} is not available: {reason}.", hint or "Use --device cpu or auto.")


def start_device(device: torch.device) -> None:
    """Initialise CUDA on `device` and run a kernel: some faults appear only then.

    Raises DeviceFailed if that fails, OutOfMemoryBudget if the device has no free memory, and UsageError for invalid
    allocator options in the environment.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # real problems raise
            run_kernel(device)
    except Exception as error:  # noqa: BLE001 - only torch is called, with errors of several types
        if not allocator.disable_expandable_segments(error):
            raise build_start_error(device, error) from error
        start_device(device)


def run_kernel(device: torch.device) -> None:
    """Run a small kernel on `device` and wait for it."""
    import torch

    torch.ones(1, device=device)
    synchronize(device)


def build_start_error(device: torch.device, error: Exception) -> LinfusionError:
    """Return the LinfusionError for torch's `error` at the start of `device`."""
    if (option_error := allocator.translate_option_error(error)) is not None:
        return option_error
    reason = first_line(error).rstrip(". ")
    if is_out_of_memory(error):
        return OutOfMemoryBudget(f"{device} has no free memory ({reason}).", f"{HINT_GPU_BUSY} {HINT_USE_CPU}")
    known = translate_error(error)
    hint = HINT_CHECK_DRIVER if known is None else known.hint
    return DeviceFailed(f"{device} cannot be used: {reason}.", f"{hint} {HINT_USE_CPU}")


def pick_dtype(name: str, device: torch.device, bfloat16: bool | None = None) -> torch.dtype:
    """Return the UNet's dtype for --dtype. `auto` is float16 on a GPU.

    A CPU supports float32 only: half precision is 100 times slower there. `bfloat16` says whether the GPU supports that
    dtype; None asks the GPU. Raises UsageError.
    """
    import torch

    if device.type == "cpu" and not _half_on_cpu(name):
        if name not in ("auto", "float32"):
            raise UsageError(f"--dtype {name} requires a GPU: the CPU runs in float32.", "Omit --dtype.")
        return torch.float32
    if name == "bfloat16" and is_cuda(device) and not (has_bfloat16(device) if bfloat16 is None else bfloat16):
        reason = f"--dtype bfloat16 is not supported by {device}."
        raise UsageError(reason, "Use --dtype float16 or float32.", "dtype")
    return torch.float16 if name == "auto" else getattr(torch, name)


def _half_on_cpu(name: str) -> bool:
    """Return whether the CPU computes in this half-precision dtype: only with LINFUSION_CPU_HALF=1, for tests."""
    return name in ("float16", "bfloat16") and os.environ.get("LINFUSION_CPU_HALF") == "1"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of the dtype as in --dtype: torch.float16 -> float16."""
    return str(dtype).removeprefix("torch.")


def pick_vae_dtype(name: str, device: torch.device, bfloat16: bool | None = None) -> torch.dtype:
    """Return the VAE's dtype: bfloat16 on GPUs that support it, else float32, also if --dtype is float32.

    Never float16, in which the SDXL VAE overflows and returns black images. `bfloat16` is as in `pick_dtype`.
    """
    import torch

    if device.type != "cuda" or name == "float32":
        return torch.bfloat16 if device.type == "cpu" and _half_on_cpu(name) else torch.float32
    supported = has_bfloat16(device) if bfloat16 is None else bfloat16
    return torch.bfloat16 if supported else torch.float32
