"""The device of a run: choosing and starting it, its number formats, and the memory that a stretch of work took."""

from __future__ import annotations

import gc
import os
import platform
import re
import resource
import warnings
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from linfusion_cli import __version__
from linfusion_cli.core.errors import (
    DeviceFailed,
    LinfusionError,
    OutOfMemoryBudget,
    Unavailable,
    UsageError,
    first_line,
)
from linfusion_cli.hardware import allocator, diagnosis
from linfusion_cli.hardware.cuda import (
    free_device_bytes,
    has_bfloat16,
    is_cuda,
    limit_device_memory,
    platform_name,
    synchronize,
)
from linfusion_cli.hardware.failures import MENDED, explained, is_out_of_memory
from linfusion_cli.hardware.memory import (
    forgets_peaks,
    free_host_bytes,
    high_water_bytes,
    memory_limit_bytes,
    resident_bytes,
    trim_heap,
)

if TYPE_CHECKING:
    import torch

__all__ = [  # with what other modules have for it
    "PeakMemory",
    "cpu_count",
    "describe",
    "dtype_name",
    "explained",
    "forgets_peaks",
    "free_device_bytes",
    "free_host_bytes",
    "free_memory",
    "installed",
    "is_out_of_memory",
    "limit_device_memory",
    "memory_limit_bytes",
    "pick_device",
    "pick_dtype",
    "pick_vae_dtype",
    "resident_bytes",
    "start",
    "versions",
]
WITHOUT = "Use --device cpu to do without a GPU."


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` … -> a device that is there and works.

    `auto` is the CPU where torch sees no GPU; one that it sees has to work, as a run on the CPU in its place would take
    days. A CUDA device always has an index: `torch.cuda.set_per_process_memory_fraction` refuses one without.

    Raises UsageError; Unavailable for a device that is not there; what `start` raises for one that does not work.
    """
    import torch

    match = re.fullmatch(r"auto|cpu|cuda(?::(0|[1-9][0-9]{0,8}))?", name)
    if match is None:
        raise UsageError(f"--device {name!r} is unknown.", "Use auto, cpu, cuda or cuda:N.", "device")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    index = int(match[1] or 0)
    # Asked by number, as torch.device wraps large ones around.
    if index >= torch.cuda.device_count():
        raise absent(name)
    device = torch.device("cuda", index)
    start(device)
    return device


def absent(name: str) -> Unavailable:
    """That there is no such GPU, and why."""
    import torch

    reason, hint = (diagnosis.seen(), "") if torch.cuda.device_count() else diagnosis.why_no_device()
    return Unavailable(f"--device {name} is not on this machine: {reason}.", hint or "Use --device cpu or auto.")


def start(device: torch.device) -> None:
    """Start CUDA on `device` and run a kernel there, as some faults show only then.

    Raises DeviceFailed where that fails, DoesNotFit where nothing of its memory is left, UsageError for options of
    torch's allocator, in the environment, that torch does not understand.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of several lines; what matters fails below
            run_kernel(device)
    except Exception as error:  # noqa: BLE001 - of whatever type: nothing but torch is called
        if not allocator.fall_back(error):
            raise not_started(device, error) from error
        start(device)


def run_kernel(device: torch.device) -> None:
    import torch

    torch.ones(1, device=device)
    synchronize(device)


def not_started(device: torch.device, error: Exception) -> LinfusionError:
    """Why `device` does not work, from torch's `error`."""
    said = first_line(error).rstrip(". ")
    if (wrong := allocator.complaint(error)) is not None:
        return wrong
    if is_out_of_memory(error):
        return OutOfMemoryBudget(
            f"{device} has no memory left ({said}).", f"End what uses it (see `nvidia-smi`). {WITHOUT}"
        )
    found = explained(error)
    hint = MENDED if found is None else found.hint
    return DeviceFailed(f"{device} cannot be used: {said}.", f"{hint} {WITHOUT}")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The UNet's number format: `auto` is float16 on a GPU; a CPU has float32 only, as half runs 100 times slower."""
    import torch

    if device.type == "cpu" and not _half_on_cpu(name):
        if name not in ("auto", "float32"):
            raise UsageError(f"--dtype {name} needs a GPU: a CPU runs in float32.", "Leave --dtype out.")
        return torch.float32
    if name == "bfloat16" and is_cuda(device) and not has_bfloat16(device):
        reason = f"--dtype bfloat16 is not possible on {device}, which has no bfloat16."
        raise UsageError(reason, "Use --dtype float16 or float32.", "dtype")
    return torch.float16 if name == "auto" else getattr(torch, name)


def _half_on_cpu(name: str) -> bool:
    """Whether `name` is half precision, and the CPU is to compute in it: for tests of what cards do, where none is.

    Only with LINFUSION_CPU_HALF=1, which is for developers.
    """
    return name in ("float16", "bfloat16") and os.environ.get("LINFUSION_CPU_HALF") == "1"


def dtype_name(dtype: torch.dtype) -> str:
    """Its name as --dtype takes it: torch.float16 -> float16."""
    return str(dtype).removeprefix("torch.")


def pick_vae_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 on cards that have it, unless float32 is asked for; never float16, where SDXL's overflows to black."""
    import torch

    if device.type != "cuda" or name == "float32":
        return torch.bfloat16 if device.type == "cpu" and _half_on_cpu(name) else torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def cpu_count() -> int:
    """The CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class PeakMemory:
    """Peak memory of a stretch of work: begins when made, read by `host_bytes` and `device_bytes`.

    `device` is None while it is not known, and torch is not imported yet.
    """

    device: torch.device | None

    def __post_init__(self) -> None:
        if is_cuda(self.device):
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        self._forgets = forgets_peaks()

    def host_bytes(self) -> int:
        """Peak resident memory since the beginning, or of the process so far where no peak is forgotten."""
        peak = high_water_bytes() if self._forgets else None
        return peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def device_bytes(self) -> int | None:
        """Peak of the memory torch held on the card, or None without one."""
        if not is_cuda(self.device):
            return None
        import torch

        return torch.cuda.max_memory_reserved(self.device)


def free_memory(device: torch.device | None) -> None:
    """Give back what the last stretch of work left: cycles, freed memory the allocator kept, the card's cache.

    Waits for the card first, as memory that its work still uses stays. What goes wrong in that work is raised, unless
    memory runs out: then there is the more reason to go on.
    """
    gc.collect()
    trim_heap()
    if not is_cuda(device):
        return
    import torch

    for give_back in (partial(synchronize, device), torch.cuda.empty_cache):
        try:
            give_back()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise


def describe(device: torch.device) -> dict[str, Any]:
    """What a report says of the machine."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    peaks = "stage" if forgets_peaks() else "process"  # what the host peaks of a report are counted over
    memory = {"memory_bytes": memory_limit_bytes(), "host_peaks_of": peaks}
    runs_on = platform_name() if is_cuda(device) else "CPU"
    return {"device": str(device), "name": name, "platform": runs_on, "cpus": cpu_count()} | memory


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    packages = ("torch", "diffusers", "transformers")
    own = {"python": platform.python_version(), "linfusion": __version__}
    return own | {name: installed(name) or "unknown" for name in packages}


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
