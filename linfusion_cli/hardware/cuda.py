"""What is asked of a CUDA or ROCm device beside kernels: number formats, memory and its limit, precision of fp32."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from linfusion_cli.hardware import allocator

if TYPE_CHECKING:
    import torch

# Less than cuBLAS and cuDNN take for a handle and its workspace; they have their own memory, beside torch's.
FULL_BYTES = 512 << 20
# Said of the question how much memory is free, by the drivers of some virtual GPUs and in some containers.
NO_ANSWER = re.compile(r"(?:CUDA|HIP) error: (?:operation not (?:supported|permitted)|invalid argument)")
# Of torch's start: several lines each, of what we say in one where it matters.
START_WARNINGS = (
    r"CUDA initialization: ",
    r"HIP initialization: ",
    r"Can't (?:initialize NVML|get nvml device count|get device handle|get device UUID|initialize amdsmi)",
    r"Found GPU\d+ ",
    r"\s*.* with CUDA capability sm_",
    r".*PyTorch was compiled with an unknown compute capability",
)


@contextmanager
def quiet_start() -> Iterator[None]:
    """Within, torch does not warn about devices and drivers: whoever needs them asks, and says it in one line."""
    with warnings.catch_warnings():
        for text in START_WARNINGS:
            warnings.filterwarnings("ignore", message=text)
        yield


def is_cuda(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def platform_name() -> str | None:
    """What torch is built for: "CUDA 12.8", "ROCm 6.4", or None for neither."""
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else None


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was asked to; raises what went wrong in it, of which nobody knew."""
    import torch

    if is_cuda(device):
        torch.cuda.synchronize(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a card computes in bfloat16 itself; torch would emulate it on others, many times slower."""
    import torch

    with torch.cuda.device(device):  # the question is about the present card, and asks for no other
        return torch.cuda.is_bf16_supported(including_emulation=False)


def total_bytes(device: torch.device) -> int:
    """The memory of a card, or of the part of it that is seen as one (MIG)."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory


def free_device_bytes(device: torch.device) -> int:
    """The memory of a card that this process could still take: what torch holds and does not use can be had again.

    Where the driver does not say what is free, all that this process has not taken counts.
    """
    import torch

    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    try:
        free, _ = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        if not NO_ANSWER.match(str(error)):
            raise
        free = total_bytes(device) - reserved
    allowed = int(allocator.share() * total_bytes(device)) - allocated
    return max(0, min(free + reserved - allocated, allowed))


def limit_device_memory(device: torch.device, budget_bytes: int | None) -> None:
    """Let torch hold no more than this of a CUDA card, None for all of it: beyond, its memory has run out.

    A smaller share that the user has given to torch's allocator stays.
    """
    import torch

    if is_cuda(device):
        total = total_bytes(device)
        wanted = (total if budget_bytes is None else budget_bytes) / total
        torch.cuda.set_per_process_memory_fraction(min(allocator.share(), wanted), device)


def is_full() -> bool:
    """Whether a card that this process uses has so little memory left that libraries get none for themselves."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    # Asking another card for its memory would take some of it.
    used = [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(index)]
    try:
        return any(torch.cuda.mem_get_info(index)[0] < FULL_BYTES for index in used)
    except RuntimeError:  # it does not say
        return False


def forbid_tf32() -> None:
    """Make fp32 mean fp32 in products and convolutions: by default torch computes convolutions with 10 bits of 23.

    By torch's older settings, which all releases have: where the newer ones are set, reading the older ones fails.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
