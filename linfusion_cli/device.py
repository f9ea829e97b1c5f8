"""What this machine has: devices, number formats, memory and its limits, and what a stretch of work took of it."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import resource
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from linfusion_cli import __version__
from linfusion_cli.errors import Unavailable, UsageError

if TYPE_CHECKING:
    import torch

PROC_SELF = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")
CGROUP_LIMITS = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}  # version 2 and 1
MIB = 1 << 20
OUT_OF_MEMORY = (
    "can't allocate memory",
    "could not create a primitive",  # oneDNN's only word for it
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` … -> a device that is there; raises UsageError or Unavailable.

    A CUDA device always has an index: `torch.cuda.set_per_process_memory_fraction` refuses one without.
    """
    import torch

    match = re.fullmatch(r"auto|cpu|cuda(?::(0|[1-9][0-9]{0,8}))?", name)
    if match is None:
        raise UsageError(f"--device {name!r} is unknown.", "Use auto, cpu, cuda or cuda:N.", "device")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    index = int(match[1] or 0)
    # Asked by number, as torch.device wraps large ones around.
    if name != "auto" and index >= torch.cuda.device_count():
        raise Unavailable(f"--device {name} is not on this machine: {_cuda_state()}.", "Use --device cpu or auto.")
    return torch.device("cuda", index)


def _cuda_state() -> str:
    """Why there is no such CUDA device, in words."""
    import torch

    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    count = torch.cuda.device_count()
    return f"torch sees {count} CUDA device{'' if count == 1 else 's'}"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The UNet's number format: `auto` is float16 on a GPU; a CPU has float32 only, as half runs 100 times slower."""
    import torch

    if device.type == "cpu":
        if name not in ("auto", "float32"):
            raise UsageError(f"--dtype {name} needs a GPU: a CPU runs in float32.", "Leave --dtype out.")
        return torch.float32
    return torch.float16 if name == "auto" else getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """Its name as --dtype takes it: torch.float16 -> float16."""
    return str(dtype).removeprefix("torch.")


def pick_vae_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 on cards that have it, unless float32 is asked for; never float16, where SDXL's overflows to black."""
    import torch

    if device.type != "cuda" or name == "float32":
        return torch.float32
    with torch.cuda.device(device):  # the question is about the present card, and asks for no other
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def memory_limit_bytes() -> int:
    """The memory this process may use: the machine's, or what cgroup, SLURM or `ulimit -v` leave of it."""
    limits = [psutil.virtual_memory().total, *_cgroup_limits(), *_slurm_limits(), *_address_limits()]
    return min(limits)


def free_host_bytes() -> int:
    """The memory this process could still take: what the machine has to give, or what a limit leaves of it."""
    own = psutil.Process().memory_info()
    left = [psutil.virtual_memory().available, *(limit - used for limit, used in _cgroups())]
    left += [limit - own.rss for limit in _slurm_limits()] + [limit - own.vms for limit in _address_limits()]
    return max(0, min(left))


def free_device_bytes(device: torch.device) -> int:
    """As `free_host_bytes`, of a CUDA card: what torch holds and does not use can be had again."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def limit_device_memory(device: torch.device, budget_bytes: int | None) -> None:
    """Let torch hold no more than this of a CUDA card, None for all of it: beyond, its memory has run out."""
    import torch

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (budget_bytes or total) / total), device)


def resident_bytes() -> int:
    """The memory this process has now."""
    return psutil.Process().memory_info().rss


def _cgroup_limits() -> list[int]:
    return [limit for limit, _ in _cgroups()]


def _cgroups() -> list[tuple[int, int]]:
    """Limit and use of this process's cgroup and of all above it that have a limit; "max" means none."""
    paths = [line.split(":", 2)[2].strip("/") for line in _lines(PROC_SELF / "cgroup")]
    folders = {folder for path in paths for base in (CGROUP, CGROUP / "memory") for folder in _upwards(base, path)}
    found = []
    for folder in folders:
        for limit, usage in CGROUP_LIMITS.items():
            text = "".join(_lines(folder / limit))
            if text.isdigit():
                found.append((int(text), _cgroup_use(folder, usage)))
    return found


def _cgroup_use(folder: Path, name: str) -> int:
    """What a cgroup uses, but for cached files, which the kernel gives up for whoever asks."""
    used = "".join(_lines(folder / name))
    stat = dict(line.split() for line in _lines(folder / "memory.stat"))
    total = "total_" if "total_cache" in stat else ""  # version 1 counts the groups below apart
    cached = sum(int(stat.get(f"{total}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, int(used or 0) - cached)


def _upwards(base: Path, path: str) -> list[Path]:
    """`base`/`path` and every folder above it, down to `base`."""
    parts = Path(path).parts
    return [base.joinpath(*parts[:count]) for count in range(len(parts) + 1)]


def _lines(path: Path) -> list[str]:
    """The lines of a small system file, none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _slurm_limits() -> list[int]:
    """What --mem or --mem-per-cpu gave a SLURM job; 0 means all (sbatch's output environment variables, in MiB)."""
    return [mib * MIB for mib in (_slurm("MEM_PER_NODE"), _slurm("MEM_PER_CPU") * _slurm("CPUS_ON_NODE")) if mib]


def _slurm(name: str) -> int:
    text = os.environ.get(f"SLURM_{name}", "")
    return int(text) if text.isdigit() else 0


def _address_limits() -> list[int]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if soft == resource.RLIM_INFINITY else [soft]


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
        if _is_cuda(self.device):
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        self._forgets = forgets_peaks()

    def host_bytes(self) -> int:
        """Peak resident memory since the beginning, or of the process so far where no peak is forgotten."""
        peak = _high_water_bytes() if self._forgets else None
        return peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def device_bytes(self) -> int | None:
        """Peak of the memory torch held on the card, or None without one."""
        if not _is_cuda(self.device):
            return None
        import torch

        return torch.cuda.max_memory_reserved(self.device)


def forgets_peaks() -> bool:
    """Make the kernel forget this process's peak memory (5 to clear_refs, proc(5)); containers may refuse."""
    try:
        (PROC_SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return _high_water_bytes() is not None


def _high_water_bytes() -> int | None:
    """The largest resident memory since the kernel last forgot it, None where it does not say."""
    peaks = [line.split()[1] for line in _lines(PROC_SELF / "status") if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, or the CPU's or the card's as torch says it (by name, to import no torch)."""
    by_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_type or any(phrase in str(error) for phrase in OUT_OF_MEMORY)


def _is_cuda(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def free_memory(device: torch.device | None) -> None:
    """Give back what the last stretch of work left: cycles, freed memory the allocator kept, the card's cache."""
    gc.collect()
    _trim_heap()
    if _is_cuda(device):
        import torch

        torch.cuda.empty_cache()


def _trim_heap() -> None:
    """Return freed memory to the system: glibc keeps whole gigabytes of it where small live blocks lie in between."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only, see malloc_trim(3)
    if trim is not None:
        trim(0)


def describe(device: torch.device) -> dict[str, Any]:
    """What a report says of the machine."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    peaks = "stage" if forgets_peaks() else "process"  # what the host peaks of a report are counted over
    memory = {"memory_bytes": memory_limit_bytes(), "host_peaks_of": peaks}
    return {"device": str(device), "name": name, "cpus": cpu_count()} | memory


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
