"""Describe the machine and the installed versions, for reports and `linfusion doctor`."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from linfusion_cli import __version__
from linfusion_cli.hardware.cuda import is_cuda, platform_name
from linfusion_cli.hardware.host_memory import memory_limit_bytes, reset_host_peak

if TYPE_CHECKING:
    import torch


def cpu_count() -> int:
    """Return the number of CPUs that this process can run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the description of the machine for the report."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    peaks = "stage" if reset_host_peak() else "process"  # the scope of the host peaks in the report
    memory = {"memory_bytes": memory_limit_bytes(), "host_peaks_of": peaks}
    runs_on = platform_name() if is_cuda(device) else "CPU"
    return {"device": str(device), "name": name, "platform": runs_on, "cpus": cpu_count()} | memory


def collect_versions() -> dict[str, str]:
    """Return the versions of Python, linfusion and the libraries that results depend on."""
    packages = ("torch", "diffusers", "transformers")
    own = {"python": platform.python_version(), "linfusion": __version__}
    return own | {name: find_version(name) or "unknown" for name in packages}


def find_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
