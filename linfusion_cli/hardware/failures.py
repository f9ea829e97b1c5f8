"""What an error of torch means: memory ran out, a GPU cannot be used or was lost, or it may be a bug of ours.

torch has few types for this and says most in words, which are compared from the first one on: they may stand in a
file's name too. They come from torch (c10/cuda, ATen/cuda, ATen/cudnn) and from cudaGetErrorString and its like in HIP.
An illegal access to memory and a failed assertion on the device are not among them: these may be bugs.
"""

from __future__ import annotations

import errno
import re

from linfusion_cli.core.errors import DeviceFailed, LinfusionError, OutOfMemory, first_line
from linfusion_cli.hardware.cuda import is_full

CARD = r"(?:CUDA|HIP)(?: driver)? error: "
LIBRARY = r"(?:(?:CUDA|HIP) error|cuDNN(?: Frontend)? error|MIOpen error): "
OUT_OF_MEMORY = re.compile(
    rf"(?:CUDA|HIP) out of memory\. |{CARD}out of memory"
    rf"|{LIBRARY}(?:CUBLAS|HIPBLAS|CUDNN)_STATUS_ALLOC_FAILED|{LIBRARY}miopenStatusAllocFailed"
    rf"|{LIBRARY}CUDNN_STATUS_INTERNAL_ERROR_(?:HOST|DEVICE)_ALLOCATION_FAILED"
    # cuDNN tries what it has until one fits; none does where there is no room for their workspaces.
    r"|(?:FIND |GET )?(?:was )?[Uu]nable to find an engine to execute this computation"
    # torch asks NVML for the numbers in its message and fails there: on MIG, in containers, on Jetson.
    r'|NVML_SUCCESS == \S+ INTERNAL ASSERT FAILED at "[^"]*CUDACachingAllocator\.cpp"'
    r"|(?:\[[^\]]*\] [^:]{0,80})?DefaultCPUAllocator: (?:can't allocate|not enough) memory"
    r"|could not create a (?:primitive|memory object)$|std::bad_alloc|bad allocation"  # oneDNN's, C++'s
    r"|unable to (?:mmap|allocate|resize) .*: Cannot allocate memory \(12\)$",
    re.MULTILINE,
)
# Libraries that get no memory for a handle say no more than this.
NO_HANDLE = re.compile(rf"{LIBRARY}(?:CUBLAS|HIPBLAS|CUDNN)_STATUS_NOT_INITIALIZED")

SMALLER = "Use a smaller --size, or end other programs that use this memory."
DRIVER = "Update the driver, or install a build of torch that it can run."
OTHER_BUILD = "Install a build of torch for this GPU: https://pytorch.org/get-started/locally/ lists them."
BUSY = "End what uses it (see `nvidia-smi`), or try again later."
WHICH = "Check --device and CUDA_VISIBLE_DEVICES; `linfusion doctor` lists the GPUs that can be used."
MENDED = "Check the driver with `nvidia-smi`; after an update of the driver, restart the machine."
LOST = "Check it with `nvidia-smi` and the kernel's log before you go on."
UNUSABLE = (
    (
        r"The NVIDIA driver on your system is too old|Found no NVIDIA driver"
        rf"|{CARD}(?:CUDA driver version is insufficient|the provided PTX was compiled with|PTX JIT"
        r"|system has unsupported display driver|forward compatibility was attempted|CUDA driver is a stub)",
        DRIVER,
    ),
    (
        rf"{CARD}(?:no kernel image is available|device kernel image is invalid|invalid device function)"
        rf"|{LIBRARY}\w+_STATUS_ARCH_MISMATCH|cuDNN version incompatibility"
        rf"|{LIBRARY}CUDNN_STATUS_(?:SUB)?LIBRARY_VERSION_MISMATCH",
        OTHER_BUILD,
    ),
    (
        rf"{CARD}(?:CUDA-capable device\(s\) is/are busy|all CUDA-capable devices are busy"
        r"|exclusive-thread device already in use|MPS |the hardware resources required to create MPS|The MPS client"
        r"|the remote procedural call between the MPS)",
        BUSY,
    ),
    (
        rf"No (?:CUDA|HIP) GPUs are available|{CARD}(?:no (?:CUDA|ROCm)-capable device|invalid device ordinal)"
        r"|Invalid device id|Torch not compiled with CUDA|PyTorch was compiled without",
        WHICH,
    ),
    (
        r"Unexpected error from (?:cuda|hip)GetDeviceCount|(?:CUDA|HIP) unknown error - this may be due to"
        r"|(?:CUDA|HIP) driver initialization failed|CUDA call failed lazily at initialization"
        rf"|libcudart functions unavailable|{CARD}(?:initialization error|system not yet initialized|OS call failed"
        r"|device is not licensed|integrity checks failed|shared object initialization failed|Driver/library version)"
        rf"|{NO_HANDLE.pattern}|Failed to initialize NVML",
        MENDED,
    ),
    (
        rf"{CARD}(?:unspecified launch failure|the launch timed out|uncorrectable (?:ECC|NVLink) error|unknown error"
        r"|hardware stack error|driver shutting down|context is destroyed|GPU is lost|(?:GPU |the )?device is removed"
        r"|Invalid access of peer GPU memory)|GPU is lost",
        LOST,
    ),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, the system's, or torch's on the CPU or a card (by name, to import no torch)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = text_of(error)
    return bool(OUT_OF_MEMORY.match(said)) or (NO_HANDLE.match(said) is not None and is_full())


def explained(error: BaseException) -> LinfusionError | None:
    """`error` as what a person can do something about, None where it may be a bug."""
    said = first_line(error).rstrip(". ")
    if is_out_of_memory(error):
        return OutOfMemory(f"There is not enough memory for this ({shortened(said)}).", SMALLER)
    hint = hint_for(text_of(error))
    if hint is None:
        return None
    what = "was lost" if hint is LOST else "cannot be used"
    return DeviceFailed(f"The GPU {what}: {said}.", hint)


def hint_for(said: str) -> str | None:
    """What to do about a GPU of which torch says this, None if that tells nothing of a GPU."""
    return next((hint for pattern, hint in UNUSABLE if re.match(pattern, said)), None)


def shortened(said: str) -> str:
    """The first sentence: torch adds tables and advice."""
    return re.split(r"\. (?=[A-Z])", said)[0]


def text_of(error: BaseException) -> str:
    """What torch says in `error`; nothing for errors that are not torch's, which may quote a file's name."""
    kind = type(error).__name__
    if kind == "CudaError":  # of a call of the runtime, without the words that go before elsewhere
        return f"CUDA error: {error}"
    is_torchs = isinstance(error, RuntimeError | AssertionError) or kind == "DeferredCudaCallError"
    return str(error) if is_torchs else ""
