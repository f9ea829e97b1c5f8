"""Why torch has no GPU to compute on, and what to do about it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from linfusion_cli.core.errors import first_line
from linfusion_cli.hardware.cuda import platform_name, quiet_start
from linfusion_cli.hardware.failures import MENDED, hint_for

NVIDIA = (Path("/proc/driver/nvidia/gpus"), Path("/dev/nvidia0"))
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
WHEELS = "https://download.pytorch.org/whl"
CUDA_13 = (2, 9), 580  # the first torch that is built for it, and the first driver that runs it
NO_DEVICE_ERRORS = re.compile(
    r"No (?:CUDA|HIP) GPUs are available|no (?:CUDA|ROCm)-capable device|invalid device ordinal"
)
ALL_HIDDEN = re.compile(r"\s*(?:-\d+|NoDevFiles|none|void)?\s*(?:,.*)?")
HIDERS = {"CUDA": ("CUDA_VISIBLE_DEVICES",), "ROCm": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")}


def why_no_device() -> tuple[str, str]:
    """Why torch sees no GPU, as a clause, and what to do, as a sentence: empty where nothing is known to help.

    To be asked where `torch.cuda.is_available()` says no.
    """
    import torch

    platform = platform_name()
    if platform is None:
        reason = f"this build of torch ({torch.__version__}) has no CUDA"
        return (f"{reason}, and an NVIDIA GPU is here", install_hint()) if nvidia_is_here() else (reason, "")
    found = initialisation_error()
    if NO_DEVICE_ERRORS.search(found):
        return hidden() or (f"torch is built for {platform} but sees no device", MENDED if nvidia_is_here() else "")
    return found.rstrip("."), hint_for(found) or MENDED


def initialisation_error() -> str:
    """The first line of what torch says when it is made to start; it only warns where it is asked what there is."""
    import torch

    try:
        with quiet_start():
            torch.cuda.init()
    except Exception as error:  # noqa: BLE001 - of whatever type: RuntimeError, AssertionError and others are known
        return first_line(error)
    return "No CUDA GPUs are available"


def hidden() -> tuple[str, str] | None:
    """That a variable of the environment hides all GPUs, and what to do; None where none is set."""
    setting = visible_setting()
    if setting is None:
        return None
    name, value = setting
    if ALL_HIDDEN.fullmatch(value):
        return f"{name}={value!r} hides all GPUs", f"Unset {name}, or name a GPU in it."
    known = "Indices count from 0; `nvidia-smi -L` lists the UUIDs (GPU-…, MIG-…)."
    return f"{name}={value!r} names no GPU of this machine", f"Correct {name}. {known}"


def visible_setting() -> tuple[str, str] | None:
    """The variable that says which GPUs torch may see, and its value; None where there is none."""
    platform = (platform_name() or "CUDA").split()[0]
    names = (*HIDERS[platform], *HIDERS["CUDA"])  # ROCm heeds CUDA's too
    return next(((name, os.environ[name]) for name in names if name in os.environ), None)


def seen() -> str:
    """How many GPUs torch sees, in words, and the variable that may hide others."""
    import torch

    count, setting = torch.cuda.device_count(), visible_setting()
    kind = (platform_name() or "CUDA").split()[0]
    hint = f" ({setting[0]}={setting[1]!r})" if setting else ""
    return f"torch sees {count} {kind} device{'' if count == 1 else 's'}{hint}"


def nvidia_is_here() -> bool:
    """Whether the machine has an NVIDIA GPU, as far as can be seen without CUDA."""
    return any(path.exists() for path in NVIDIA) or shutil.which("nvidia-smi") is not None


def install_hint() -> str:
    """How to install the present release of torch for the NVIDIA GPU that is here."""
    return f"Install torch for it: {install_command()}"


def install_command() -> str:
    """pip's, for a build of the present release with CUDA: 12.6, which most drivers run, or 13.0 for newer ones."""
    import torch

    release = torch.__version__.split("+")[0]
    numbers = tuple(map(int, re.findall(r"\d+", release)[:2]))
    is_new = numbers >= CUDA_13[0] and driver_number() >= CUDA_13[1]
    return f"pip install --force-reinstall torch=={release} --index-url {WHEELS}/{'cu130' if is_new else 'cu126'}"


def driver_number() -> int:
    """The first number of the NVIDIA driver's version, 0 where the kernel does not say."""
    try:
        text = DRIVER_VERSION.read_text()
    except OSError:
        return 0
    match = re.search(r"Kernel Module.*?\s(\d+)\.\d+", text)
    return int(match[1]) if match else 0
