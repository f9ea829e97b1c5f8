"""Translate errors of torch: out of memory, an unusable GPU, a lost GPU, or possibly a bug in linfusion.

torch has few exception types for this, so the messages are matched, from their start only: a file name can contain the
same words. The messages are those of torch (c10/cuda, ATen/cuda, ATen/cudnn), of cudaGetErrorString and its equivalent
in HIP. Illegal memory accesses and device-side assertions are not included: they can be bugs in linfusion.
"""

from __future__ import annotations

import errno
import re

from linfusion_cli.core.errors import DeviceFailed, LinfusionError, OutOfMemory, first_line
from linfusion_cli.hardware.cuda import is_any_gpu_full

RUNTIME_ERROR = r"(?:CUDA|HIP)(?: driver)? error: "
LIBRARY_ERROR = r"(?:(?:CUDA|HIP) error|cuDNN(?: Frontend)? error|MIOpen error): "
OUT_OF_MEMORY = re.compile(
    rf"(?:CUDA|HIP) out of memory\. |{RUNTIME_ERROR}out of memory"
    rf"|{LIBRARY_ERROR}(?:CUBLAS|HIPBLAS|CUDNN)_STATUS_ALLOC_FAILED|{LIBRARY_ERROR}miopenStatusAllocFailed"
    rf"|{LIBRARY_ERROR}CUDNN_STATUS_INTERNAL_ERROR_(?:HOST|DEVICE)_ALLOCATION_FAILED"
    # cuDNN tries one engine after the other; all fail if there is no memory for their workspaces.
    r"|(?:FIND |GET )?(?:was )?[Uu]nable to find an engine to execute this computation"
    # torch queries NVML for the numbers in its message, which fails on MIG, in containers and on Jetson.
    r'|NVML_SUCCESS == \S+ INTERNAL ASSERT FAILED at "[^"]*CUDACachingAllocator\.cpp"'
    r"|(?:\[[^\]]*\] [^:]{0,80})?DefaultCPUAllocator: (?:can't allocate|not enough) memory"
    r"|could not create a (?:primitive|memory object)$|std::bad_alloc|bad allocation"  # oneDNN, C++
    r"|unable to (?:mmap|allocate|resize) .*: Cannot allocate memory \(12\)$",
    re.MULTILINE,
)
# Libraries return only this if there is no memory for a handle.
NOT_INITIALIZED = re.compile(rf"{LIBRARY_ERROR}(?:CUBLAS|HIPBLAS|CUDNN)_STATUS_NOT_INITIALIZED")

HINT_USE_LESS_MEMORY = "Use a smaller --size, or end other programs that use this memory."
HINT_UPDATE_DRIVER = "Update the driver, or install a torch build that it supports."
HINT_OTHER_BUILD = "Install a torch build for this GPU, see https://pytorch.org/get-started/locally/."
HINT_GPU_BUSY = "End the programs that use it (see `nvidia-smi`), or try again later."
HINT_CHECK_SELECTION = "Check --device and CUDA_VISIBLE_DEVICES; `linfusion doctor` lists the usable GPUs."
HINT_CHECK_DRIVER = "Check the driver with `nvidia-smi`; restart the machine after a driver update."
HINT_GPU_LOST = "Check it with `nvidia-smi` and the kernel log before you continue."
GPU_ERRORS = (
    (
        r"The NVIDIA driver on your system is too old|Found no NVIDIA driver"
        rf"|{RUNTIME_ERROR}(?:CUDA driver version is insufficient|the provided PTX was compiled with|PTX JIT"
        r"|system has unsupported display driver|forward compatibility was attempted|CUDA driver is a stub)",
        HINT_UPDATE_DRIVER,
    ),
    (
        rf"{RUNTIME_ERROR}(?:no kernel image is available|device kernel image is invalid|invalid device function)"
        rf"|{LIBRARY_ERROR}\w+_STATUS_ARCH_MISMATCH|cuDNN version incompatibility"
        rf"|{LIBRARY_ERROR}CUDNN_STATUS_(?:SUB)?LIBRARY_VERSION_MISMATCH",
        HINT_OTHER_BUILD,
    ),
    (
        rf"{RUNTIME_ERROR}(?:CUDA-capable device\(s\) is/are busy|all CUDA-capable devices are busy"
        r"|exclusive-thread device already in use|MPS |the hardware resources required to create MPS|The MPS client"
        r"|the remote procedural call between the MPS)",
        HINT_GPU_BUSY,
    ),
    (
        rf"No (?:CUDA|HIP) GPUs are available|{RUNTIME_ERROR}(?:no (?:CUDA|ROCm)-capable device|invalid device ordinal)"
        r"|Invalid device id|Torch not compiled with CUDA|PyTorch was compiled without",
        HINT_CHECK_SELECTION,
    ),
    (
        r"Unexpected error from (?:cuda|hip)GetDeviceCount|(?:CUDA|HIP) unknown error - this may be due to"
        r"|(?:CUDA|HIP) driver initialization failed|CUDA call failed lazily at initialization"
        rf"|libcudart functions unavailable|{RUNTIME_ERROR}(?:initialization error|system not yet initialized"
        r"|OS call failed|device is not licensed|integrity checks failed"
        r"|shared object initialization failed|Driver/library version)"
        rf"|{NOT_INITIALIZED.pattern}|Failed to initialize NVML",
        HINT_CHECK_DRIVER,
    ),
    (
        rf"{RUNTIME_ERROR}(?:unspecified launch failure|the launch timed out|uncorrectable (?:ECC|NVLink) error"
        r"|unknown error|hardware stack error|driver shutting down|context is destroyed|GPU is lost"
        r"|(?:GPU |the )?device is removed|Invalid access of peer GPU memory)|GPU is lost",
        HINT_GPU_LOST,
    ),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether this is an out-of-memory error of Python, the system, or torch on the CPU or a GPU.

    torch's exception type is compared by name, to avoid importing torch.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    message = get_torch_message(error)
    return bool(OUT_OF_MEMORY.match(message)) or (NOT_INITIALIZED.match(message) is not None and is_any_gpu_full())


def translate_error(error: BaseException) -> LinfusionError | None:
    """Return `error` as an error that the user can fix, or None if it can be a bug."""
    reason = first_line(error).rstrip(". ")
    if is_out_of_memory(error):
        return OutOfMemory(f"Not enough memory ({first_sentence(reason)}).", HINT_USE_LESS_MEMORY)
    hint = find_gpu_hint(get_torch_message(error))
    if hint is None:
        return None
    problem = "was lost" if hint is HINT_GPU_LOST else "cannot be used"
    return DeviceFailed(f"The GPU {problem}: {reason}.", hint)


def find_gpu_hint(message: str) -> str | None:
    """Return the hint for a GPU error message of torch, or None for other messages."""
    return next((hint for pattern, hint in GPU_ERRORS if re.match(pattern, message)), None)


def first_sentence(message: str) -> str:
    """Return the first sentence; torch adds tables and advice."""
    return re.split(r"\. (?=[A-Z])", message)[0]


def get_torch_message(error: BaseException) -> str:
    """Return the message of an error from torch; empty for other errors, which can contain a file name."""
    kind = type(error).__name__
    if kind == "CudaError":  # from torch.cuda.cudart(), without the usual prefix
        return f"CUDA error: {error}"
    is_from_torch = isinstance(error, RuntimeError | AssertionError) or kind == "DeferredCudaCallError"
    return str(error) if is_from_torch else ""
