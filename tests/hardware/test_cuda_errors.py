"""Errors of torch are classified by their messages, which are those of torch, cuDNN, cuBLAS and the drivers."""

import errno
import itertools
from types import SimpleNamespace

import pytest
import torch

from linfusion_cli.batch.results import JobResult
from linfusion_cli.core.errors import DataError, DeviceFailed, OutOfMemory, WriteFailed
from linfusion_cli.hardware import peak, torch_errors
from tests.batch.helpers import builder, failing, job_specs, run_batch
from tests.hardware.stub_driver import GIB, StubDriver

MORE = "\nSearch for `cudaErrorX' in https://docs.nvidia.com for more.\nCUDA kernel errors might be reported elsewhere."
CUDA0 = torch.device("cuda", 0)

OUT_OF_MEMORY = [
    MemoryError(),
    MemoryError("Unable to allocate 2.00 GiB for an array with shape (1,) and data type float32"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError(f"CUDA error: out of memory{MORE}"),
    RuntimeError(f"HIP error: out of memory{MORE}"),
    RuntimeError("CUDA driver error: out of memory"),
    torch.cuda.CudaError.__new__(torch.cuda.CudaError, 2),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find an engine to execute this computation"),
    RuntimeError("MIOpen error: miopenStatusAllocFailed"),
    RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":830, p'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes. Error code 12"),
    RuntimeError("could not create a primitive"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("unable to mmap 4096 bytes from file </models/a (1).bin>: Cannot allocate memory (12)"),
]
OUT_OF_MEMORY[9].args = ("out of memory (2)",)  # as by check_error, which needs a CUDA runtime

OTHER = [
    RuntimeError("other"),
    RuntimeError("The file /data/CUDA error: out of memory/model.safetensors has no tensor x"),
    RuntimeError("unable to open file </tmp/CUDA out of memory. a.pt> in read-only mode: No such file (2)"),
    RuntimeError("unable to mmap 4096 bytes from file </a: Cannot allocate memory (12)/b>: Permission denied (13)"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "CUDA error: out of memory.png"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ValueError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    KeyError("CUDNN_STATUS_ALLOC_FAILED"),
    DataError("CUDA error: out of memory is no LoRA."),
    WriteFailed("CUDA out of memory. is full."),
    RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"),
    torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered{MORE}"),
    torch.AcceleratorError(f"CUDA error: device-side assert triggered{MORE}"),
    torch.AcceleratorError(f"CUDA error: invalid argument{MORE}"),
    torch.AcceleratorError(f"CUDA error: misaligned address{MORE}"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    RuntimeError("Cannot re-initialize CUDA in forked subprocess"),
]

LOST = [
    "CUDA error: unspecified launch failure",
    "CUDA error: the launch timed out and was terminated",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: uncorrectable NVLink error detected during the execution",
    "CUDA error: unknown error",
    "CUDA driver error: unknown error",
    "CUDA error: hardware stack error",
    "CUDA error: driver shutting down",
    "CUDA error: context is destroyed",
    "CUDA error: GPU is lost",
    "CUDA error: device is removed",
    "HIP error: unspecified launch failure",
    "HIP error: unknown error",
]
UNUSABLE = [
    "The NVIDIA driver on your system is too old (found version 11040). Please update",
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
    "No CUDA GPUs are available",
    "No HIP GPUs are available",
    "CUDA error: no kernel image is available for execution on the device",
    "HIP error: no kernel image is available for execution on the device",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "CUDA error: all CUDA-capable devices are busy or unavailable",
    "CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env variable",
    "CUDA driver initialization failed, you might not have a CUDA gpu.",
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions? Error 804: forward compatibility was "
    "attempted on non supported HW",
    "CUDA error: forward compatibility was attempted on non supported HW",
    "CUDA error: invalid device ordinal",
    "CUDA error: system not yet initialized",
    "CUDA error: initialization error",
    "CUDA error: no CUDA-capable device is detected",
    "HIP error: no ROCm-capable device is detected",
    "CUDA error: CUDA driver version is insufficient for CUDA runtime version",
    "CUDA error: MPS client failed to connect to the MPS control daemon or the MPS server",
    "CUDA error: device is not licensed",
    "Torch not compiled with CUDA enabled",
    "cuDNN error: CUDNN_STATUS_ARCH_MISMATCH",
    "cuDNN version incompatibility: PyTorch was compiled  against (9, 1, 0) but found runtime version (8, 9, 7).",
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:60] or type(error).__name__)
def test_every_way_to_run_out_of_memory_is_known(error):
    known = torch_errors.translate_error(error)
    assert torch_errors.is_out_of_memory(error) and isinstance(known, OutOfMemory) and known.exit_code == 71
    assert str(known).startswith("Not enough memory (") and len(str(known).splitlines()) == 1


@pytest.mark.parametrize("error", OTHER, ids=lambda error: str(error)[:60])
def test_what_only_mentions_memory_or_may_be_a_bug_is_not_explained(error):
    assert not torch_errors.is_out_of_memory(error) and torch_errors.translate_error(error) is None


@pytest.mark.parametrize("text", LOST)
def test_a_lost_device_is_unavailable(text):
    known = torch_errors.translate_error(torch.AcceleratorError(f"{text}{MORE}"))
    assert isinstance(known, DeviceFailed) and known.exit_code == 69 and known.message == f"The GPU was lost: {text}."


@pytest.mark.parametrize("text", UNUSABLE)
def test_a_device_that_cannot_be_used_is_unavailable(text):
    for kind in (RuntimeError, AssertionError):
        known = torch_errors.translate_error(kind(f"{text}{MORE}"))
        assert isinstance(known, DeviceFailed) and known.message == f"The GPU cannot be used: {text.rstrip('.')}."
        assert known.hint.endswith(".") and len(str(known).splitlines()) == 1


HANDLES = [
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: HIPBLAS_STATUS_NOT_INITIALIZED when calling `hipblasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
]


@pytest.mark.parametrize("text", HANDLES)
def test_a_library_that_does_not_start_has_run_out_of_memory_on_a_full_card_only(monkeypatch, text):
    error = RuntimeError(text)
    driver = StubDriver(monkeypatch)
    driver.free = 20 << 20
    assert not torch_errors.is_out_of_memory(error)  # other processes fill that GPU, this one does not use it
    driver.reserved = GIB
    assert torch_errors.is_out_of_memory(error)
    driver.free = 4 * GIB
    assert not torch_errors.is_out_of_memory(error) and isinstance(torch_errors.translate_error(error), DeviceFailed)
    driver.fail(free=RuntimeError("CUDA error: unknown error"))
    assert not torch_errors.is_out_of_memory(error)
    monkeypatch.undo()
    assert not torch_errors.is_out_of_memory(error)  # CUDA has not started


@pytest.fixture
def calls(monkeypatch):
    """Record the calls of `release_memory` to CUDA in `made`, and raise the errors in `errors`."""
    made, errors = [], {}

    def call(name: str):
        def act(*_: object) -> None:
            made.append(name)
            if name in errors:
                raise errors[name]

        return act

    monkeypatch.setattr(torch.cuda, "synchronize", call("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", call("empty_cache"))
    return SimpleNamespace(made=made, errors=errors)


@pytest.mark.parametrize("failing_calls", [(), ("synchronize",), ("empty_cache",), ("synchronize", "empty_cache")])
def test_memory_is_freed_after_the_card_is_done_also_where_that_runs_out_of_it(calls, failing_calls):
    calls.errors |= dict.fromkeys(failing_calls, torch.AcceleratorError(f"CUDA error: out of memory{MORE}"))
    peak.release_memory(CUDA0)
    assert calls.made == ["synchronize", "empty_cache"]
    peak.release_memory(torch.device("cpu"))
    peak.release_memory(None)
    assert calls.made == ["synchronize", "empty_cache"]


@pytest.mark.parametrize("text", ["CUDA error: an illegal memory access was encountered", LOST[0]])
def test_what_went_wrong_on_the_card_is_not_lost_when_memory_is_freed(calls, text):
    calls.errors["synchronize"] = torch.AcceleratorError(f"{text}{MORE}")
    with pytest.raises(torch.AcceleratorError, match=text):
        peak.release_memory(CUDA0)


def test_a_device_lost_in_a_batch_empties_the_model_cache(tmp_path):
    """Cached models on a lost GPU are unreadable; after an out-of-memory error they only take space."""
    dropped = itertools.count()
    errors = {
        "hill 1": RuntimeError(LOST[0]),
        "hill 2": DeviceFailed("The GPU was lost."),
        "hill 3": OutOfMemory("Not enough memory."),
        "hill 4": DataError("The weights are broken."),
        "hill 5": RuntimeError(f"CUDA error: device-side assert triggered{MORE}"),
    }
    made = failing(errors)

    def make(request, origins, observer, model_cache):
        model_cache.evict = lambda *names: next(dropped)
        return made(request, origins, observer, model_cache)

    collector, _ = run_batch(tmp_path / "out", job_specs(6), make, build=builder())
    codes = [result.exit_code for result in collector.results if isinstance(result, JobResult)]
    assert codes == [69, 69, 71, 65, 70, 0] and next(dropped) == 4
