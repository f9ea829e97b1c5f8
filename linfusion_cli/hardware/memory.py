"""The host's memory: what this process may use of it, what is left, what it had at its peak, and giving it back."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

import psutil

PROC_SELF = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")
CGROUP_LIMITS = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}  # version 2 and 1
MIB = 1 << 20


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


def forgets_peaks() -> bool:
    """Make the kernel forget this process's peak memory (5 to clear_refs, proc(5)); containers may refuse."""
    try:
        (PROC_SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return high_water_bytes() is not None


def high_water_bytes() -> int | None:
    """The largest resident memory since the kernel last forgot it, None where it does not say."""
    peaks = [line.split()[1] for line in _lines(PROC_SELF / "status") if line.startswith("VmHWM:")]
    return int(peaks[0]) * 1024 if peaks else None


def trim_heap() -> None:
    """Return freed memory to the system: glibc keeps whole gigabytes of it where small live blocks lie in between."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only, see malloc_trim(3)
    if trim is not None:
        trim(0)
