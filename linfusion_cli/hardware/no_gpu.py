"""Explain why torch has no usable GPU, and how to fix it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from linfusion_cli.core.errors import first_line
from linfusion_cli.hardware.cuda import platform_name, suppress_start_warnings
from linfusion_cli.hardware.torch_errors import HINT_CHECK_DRIVER, find_gpu_hint

NVIDIA_PATHS = (Path("/proc/driver/nvidia/gpus"), Path("/dev/nvidia0"))
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
WHEELS_URL = "https://download.pytorch.org/whl"
CUDA_13_SINCE = (2, 9), 580  # the first torch release with CUDA 13 builds, and the first driver that supports it
NO_DEVICE_ERRORS = re.compile(
    r"No (?:CUDA|HIP) GPUs are available|no (?:CUDA|ROCm)-capable device|invalid device ordinal"
)
HIDES_ALL = re.compile(r"\s*(?:-\d+|NoDevFiles|none|void)?\s*(?:,.*)?")
VISIBILITY_VARIABLES = {"CUDA": ("CUDA_VISIBLE_DEVICES",), "ROCm": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")}


def explain_no_gpu() -> tuple[str, str]:
    """Return the reason why torch finds no GPU, as a clause, and a hint, as a sentence or empty.

    Call this if `torch.cuda.is_available()` is False.
    """
    import torch

    platform = platform_name()
    if platform is None:
        reason = f"this build of torch ({torch.__version__}) has no CUDA"
        if not has_nvidia_gpu():
            return reason, ""
        return f"{reason}, but this machine has an NVIDIA GPU", build_install_hint()
    message = find_init_error()
    if NO_DEVICE_ERRORS.search(message):
        hint = HINT_CHECK_DRIVER if has_nvidia_gpu() else ""
        return explain_hidden_gpus() or (f"torch is built for {platform} but finds no device", hint)
    return message.rstrip("."), find_gpu_hint(message) or HINT_CHECK_DRIVER


def find_init_error() -> str:
    """Return the first line of torch's error when CUDA is initialised; queries for devices only emit warnings."""
    import torch

    try:
        with suppress_start_warnings():
            torch.cuda.init()
    except Exception as error:  # noqa: BLE001 - RuntimeError, AssertionError and other types occur
        return first_line(error)
    return "No CUDA GPUs are available"


def explain_hidden_gpus() -> tuple[str, str] | None:
    """Return reason and hint if an environment variable hides all GPUs, or None if no such variable is set."""
    setting = find_visibility_variable()
    if setting is None:
        return None
    name, value = setting
    if HIDES_ALL.fullmatch(value):
        return f"{name}={value!r} hides all GPUs", f"Unset {name}, or set it to a GPU."
    valid_values = "Indices start at 0; `nvidia-smi -L` lists the UUIDs (GPU-…, MIG-…)."
    return f"{name}={value!r} selects no GPU of this machine", f"Correct {name}. {valid_values}"


def find_visibility_variable() -> tuple[str, str] | None:
    """Return name and value of the variable that selects the visible GPUs, or None if none is set."""
    platform = (platform_name() or "CUDA").split()[0]
    names = (*VISIBILITY_VARIABLES[platform], *VISIBILITY_VARIABLES["CUDA"])  # ROCm reads CUDA's, too
    return next(((name, os.environ[name]) for name in names if name in os.environ), None)


def describe_visible_gpus() -> str:
    """Return the number of GPUs that torch finds, in words, with the variable that can hide others."""
    import torch

    count, setting = torch.cuda.device_count(), find_visibility_variable()
    kind = (platform_name() or "CUDA").split()[0]
    hint = f" ({setting[0]}={setting[1]!r})" if setting else ""
    return f"torch finds {count} {kind} device{'' if count == 1 else 's'}{hint}"


def has_nvidia_gpu() -> bool:
    """Return whether the machine seems to have an NVIDIA GPU, without using CUDA."""
    return any(path.exists() for path in NVIDIA_PATHS) or shutil.which("nvidia-smi") is not None


def build_install_hint() -> str:
    """Return the hint to install the current torch release with CUDA."""
    return f"Install torch with CUDA: {build_install_command()}"


def build_install_command() -> str:
    """Return the pip command for the current torch release with CUDA 12.6, or 13.0 if torch and driver support it."""
    import torch

    release = torch.__version__.split("+")[0]
    numbers = tuple(map(int, re.findall(r"\d+", release)[:2]))
    is_new = numbers >= CUDA_13_SINCE[0] and read_driver_major() >= CUDA_13_SINCE[1]
    return f"pip install --force-reinstall torch=={release} --index-url {WHEELS_URL}/{'cu130' if is_new else 'cu126'}"


def read_driver_major() -> int:
    """Return the major version of the NVIDIA driver, or 0 if it is unknown."""
    try:
        text = DRIVER_VERSION.read_text()
    except OSError:
        return 0
    match = re.search(r"Kernel Module.*?\s(\d+)\.\d+", text)
    return int(match[1]) if match else 0
