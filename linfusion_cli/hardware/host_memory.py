"""Host memory of this process: limits, free and resident memory, peak, and releasing the heap."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

import psutil

PROC_SELF = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")
CGROUP_LIMITS = {
    "memory.max": "memory.current",
    "memory.limit_in_bytes": "memory.usage_in_bytes",
}  # cgroup v2 and v1: limit -> usage
MIB = 1 << 20


def memory_limit_bytes() -> int:
    """Return the memory limit of this process: that of the machine, cgroup, SLURM or `ulimit -v`."""
    limits = [psutil.virtual_memory().total, *_cgroup_limits(), *_slurm_limits(), *_address_limits()]
    return min(limits)


def free_host_bytes() -> int:
    """Return the memory that this process can still allocate within all limits."""
    own = psutil.Process().memory_info()
    left = [psutil.virtual_memory().available, *(limit - used for limit, used in _list_cgroups())]
    left += [limit - own.rss for limit in _slurm_limits()] + [limit - own.vms for limit in _address_limits()]
    return max(0, min(left))


def resident_bytes() -> int:
    """Return the current resident memory of this process."""
    return psutil.Process().memory_info().rss


def _cgroup_limits() -> list[int]:
    return [limit for limit, _ in _list_cgroups()]


def _list_cgroups() -> list[tuple[int, int]]:
    """Return limit and usage of this process's cgroup and its ancestors, of those with a limit ("max" means none)."""
    paths = [line.split(":", 2)[2].strip("/") for line in _read_lines(PROC_SELF / "cgroup")]
    folders = {
        folder for path in paths for base in (CGROUP, CGROUP / "memory") for folder in _list_ancestors(base, path)
    }
    result = []
    for folder in folders:
        for limit, usage in CGROUP_LIMITS.items():
            text = "".join(_read_lines(folder / limit))
            if text.isdigit():
                result.append((int(text), _cgroup_used_bytes(folder, usage)))
    return result


def _cgroup_used_bytes(folder: Path, name: str) -> int:
    """Return the memory that a cgroup uses without cached files, which the kernel reclaims on demand."""
    used = "".join(_read_lines(folder / name))
    stat = dict(line.split() for line in _read_lines(folder / "memory.stat"))
    total = "total_" if "total_cache" in stat else ""  # v1 has separate totals that include child groups
    cached = sum(int(stat.get(f"{total}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, int(used or 0) - cached)


def _list_ancestors(base: Path, path: str) -> list[Path]:
    """Return `base`/`path` and all its parent folders up to `base`."""
    parts = Path(path).parts
    return [base.joinpath(*parts[:count]) for count in range(len(parts) + 1)]


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a small system file; empty if it is not readable."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _slurm_limits() -> list[int]:
    """Return the memory limits of a SLURM job (--mem, --mem-per-cpu), from sbatch's variables in MiB; 0 means none."""
    return [
        mib * MIB
        for mib in (_read_slurm("MEM_PER_NODE"), _read_slurm("MEM_PER_CPU") * _read_slurm("CPUS_ON_NODE"))
        if mib
    ]


def _read_slurm(name: str) -> int:
    text = os.environ.get(f"SLURM_{name}", "")
    return int(text) if text.isdigit() else 0


def _address_limits() -> list[int]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if soft == resource.RLIM_INFINITY else [soft]


def reset_host_peak() -> bool:
    """Reset the kernel's peak of this process's memory (5 to clear_refs, see proc(5)), and return whether it worked.

    Containers can forbid it.
    """
    try:
        (PROC_SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return peak_resident_bytes() is not None


def peak_resident_bytes() -> int | None:
    """Return the peak resident memory since the last reset, or None if the kernel does not report it."""
    peaks = [line.split()[1] for line in _read_lines(PROC_SELF / "status") if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else None


def trim_heap() -> None:
    """Return freed heap memory to the system: glibc keeps gigabytes of it if small live blocks are in between."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only, see malloc_trim(3)
    if trim is not None:
        trim(0)
