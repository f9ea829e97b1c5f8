"""The checks of a GPU before any model is loaded, with torch's own Python code and a stub driver."""

import os
import warnings
from pathlib import Path

import pytest
import torch

from linfusion_cli.core.errors import DeviceFailed, OutOfMemoryBudget, Unavailable, UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.hardware import allocator, cuda, device, no_gpu, peak, torch_errors, versions
from linfusion_cli.planning import machine
from linfusion_cli.planning.speed import Speed
from linfusion_cli.settings.request import Request
from tests.hardware.stub_driver import FREE_BYTES, GIB, TOTAL_BYTES, StubDriver
from tests.support.requests import make_request

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
MORE = "\nSearch for `cudaErrorX' in https://docs.nvidia.com for more.\nCUDA kernel errors might be reported elsewhere."
CUDA0 = torch.device("cuda", 0)


@pytest.fixture
def driver(monkeypatch):
    """A stub driver with two GPUs, in an environment without variables that affect it."""
    for name in (*allocator.VARIABLES, "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "measure_speed", lambda device, dtype: Speed(1e12, 1e10))  # without running kernels
    return StubDriver(monkeypatch)


@pytest.fixture
def no_nvidia(monkeypatch, tmp_path):
    """Hide all traces of an NVIDIA GPU, and return the folder with the paths to simulate one."""
    monkeypatch.setattr(no_gpu, "NVIDIA_PATHS", (tmp_path / "gpus",))
    monkeypatch.setattr(no_gpu, "DRIVER_VERSION", tmp_path / "version")
    monkeypatch.setattr(no_gpu.shutil, "which", lambda name: None)
    return tmp_path


def request(**values: object) -> Request:
    return make_request(**{"prompt": "a hill", "size": Size(64, 64), "output": "a.png", "model": "demo"} | values)


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
@pytest.mark.parametrize(("vram", "share"), [(None, 1.0), (8 * GIB, 1 / 3), (80 * GIB, 1.0)])
def test_a_run_starts_on_every_name_of_a_device(driver, name, index, vram, share):
    found = machine.inspect_machine(request(device=name, vram=vram))
    cuda.limit_device_memory(found.device, vram)
    peak.PeakMemory(found.device)
    assert found.device == torch.device("cuda", index) and driver.ran == [found.device]
    assert (found.dtype, found.vae_dtype) == (torch.float16, torch.bfloat16)
    assert found.device_bytes == (vram or int(machine.FREE_MEMORY_SHARE * FREE_BYTES))
    assert driver.limits == [(pytest.approx(share), index)] and found.no_gpu is None


@pytest.mark.parametrize("name", ["cuda:01", "cuda:00", "cuda:+1", "cuda: 1", "cuda:1 ", "cuda:", "cuda:٣", "CUDA:1"])
def test_a_name_that_is_not_written_as_torch_writes_it_is_usage(driver, name):
    with pytest.raises(UsageError) as refused:
        device.pick_device(name)
    assert refused.value.setting == "device"


def test_a_device_beyond_the_last_is_unavailable(driver, monkeypatch):
    with pytest.raises(Unavailable, match=r"--device cuda:2 .*\b2 CUDA devices\."):
        device.pick_device("cuda:2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-12,GPU-34")
    with pytest.raises(Unavailable, match=r"2 CUDA devices \(CUDA_VISIBLE_DEVICES='GPU-12,GPU-34'\)"):
        device.pick_device("cuda:2")
    driver.built_for(hip="6.4.1")
    with pytest.raises(Unavailable, match="2 ROCm devices"):
        device.pick_device("cuda:2")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "CUDA_VISIBLE_DEVICES='' hides all GPUs. Unset CUDA_VISIBLE_DEVICES"),
        ("-1", "CUDA_VISIBLE_DEVICES='-1' hides all GPUs"),
        ("-1,0", "hides all GPUs"),  # entries after an invalid one are ignored
        ("NoDevFiles", "hides all GPUs"),
        ("7", "CUDA_VISIBLE_DEVICES='7' selects no GPU of this machine. Correct CUDA_VISIBLE_DEVICES."),
        ("GPU-deadbeef", "CUDA_VISIBLE_DEVICES='GPU-deadbeef' selects no GPU"),
        ("MIG-0000", "CUDA_VISIBLE_DEVICES='MIG-0000' selects no GPU"),
        ("0,0", "CUDA_VISIBLE_DEVICES='0,0' selects no GPU"),
    ],
)
@pytest.mark.parametrize(
    "torch_says",
    [
        "No CUDA GPUs are available",
        "Unexpected error from cudaGetDeviceCount(). Did you run? Error 101: invalid device ordinal",
    ],
)
def test_the_variable_that_hides_the_card_is_named(driver, monkeypatch, value, says, torch_says):
    driver.count = 0
    driver.fail(init=RuntimeError(torch_says))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(Unavailable) as refused:
        device.pick_device("cuda")
    assert str(refused.value).startswith("--device cuda is not available: CUDA_VISIBLE_DEVICES=")
    assert says in str(refused.value)
    found = machine.inspect_machine(request())
    assert found.device.type == "cpu"
    assert says in machine.build_cpu_notice(found, 1.0)


def test_on_rocm_its_own_variables_count_first(driver, monkeypatch):
    driver.built_for(hip="6.4.1")
    driver.count = 0
    driver.fail(init=RuntimeError("No HIP GPUs are available"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert no_gpu.explain_no_gpu()[0] == "HIP_VISIBLE_DEVICES='' hides all GPUs"
    monkeypatch.delenv("HIP_VISIBLE_DEVICES")
    assert no_gpu.explain_no_gpu()[0] == "CUDA_VISIBLE_DEVICES='0' selects no GPU of this machine"


FAULTS = {
    "no kernel": (f"CUDA error: no kernel image is available for execution on the device{MORE}", "torch build"),
    "busy": (f"CUDA error: CUDA-capable device(s) is/are busy or unavailable{MORE}", "try again later"),
    "unknown": ("CUDA unknown error - this may be due to an incorrectly set up environment", "nvidia-smi"),
    "forward": (f"CUDA error: forward compatibility was attempted on non supported HW{MORE}", "Update the driver"),
    "fabric": (f"CUDA error: system not yet initialized{MORE}", "nvidia-smi"),
    "mismatch": (f"CUDA error: system has unsupported display driver / cuda driver combination{MORE}", "driver"),
    "ordinal": (f"CUDA error: invalid device ordinal{MORE}", "CUDA_VISIBLE_DEVICES"),
    "ptx": (f"CUDA error: the provided PTX was compiled with an unsupported toolchain.{MORE}", "Update the driver"),
    "hip": (f"HIP error: invalid device function{MORE}", "torch build"),
    "ecc": (f"CUDA error: uncorrectable ECC error encountered{MORE}", "nvidia-smi"),
    "new": (f"CUDA error: a fault of tomorrow{MORE}", "nvidia-smi"),
    "old": (TOO_OLD, "Update the driver"),
}


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
@pytest.mark.parametrize(("text", "hint"), FAULTS.values(), ids=list(FAULTS))
def test_a_card_that_does_not_work_is_unavailable_and_a_run_does_not_go_to_the_cpu(driver, name, text, hint):
    driver.fail(kernel=torch.AcceleratorError(text))
    with pytest.raises(DeviceFailed) as refused:
        device.pick_device(name)
    said = str(refused.value)
    assert refused.value.exit_code == 69 and len(said.splitlines()) == 1 and hint in said and "--device cpu" in said
    assert f"cannot be used: {text.splitlines()[0].rstrip('.')}." in said


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("Torch not compiled with CUDA enabled"),
        torch.cuda.DeferredCudaCallError("CUDA call failed lazily at initialization with error: device >= 0\n\nmore"),
        AssertionError("Invalid device id"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_all_types_are_told(driver, error):
    driver.fail(kernel=error)
    with pytest.raises(DeviceFailed, match=str(error).splitlines()[0]):
        device.pick_device("cuda")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        torch.AcceleratorError(f"CUDA error: out of memory{MORE}"),
    ],
    ids=["torch", "driver"],
)
def test_a_card_without_any_memory_left_is_full(driver, monkeypatch, error):
    driver.fail(kernel=error)
    with pytest.raises(OutOfMemoryBudget, match="cuda:0 has no free memory"):
        device.pick_device("cuda")
    del driver.failures["kernel"]

    def fails(*_: object) -> None:
        raise error

    driver.free = 12 << 20
    monkeypatch.setattr(machine, "measure_speed", fails)
    with pytest.raises(OutOfMemoryBudget, match=r"cuda:0 is full: 12\.0 MiB of its memory are free"):
        machine.inspect_machine(request())


def test_options_of_the_allocator_that_torch_does_not_understand_are_usage(driver, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:true")
    driver.fail(kernel=ValueError("Expected 'True' or 'False' at index 2 in ConfigTokenizer but got 'true'"))
    with pytest.raises(UsageError, match="PYTORCH_ALLOC_CONF='expandable_segments:true'"):
        device.pick_device("auto")


def test_a_driver_that_refuses_expandable_segments_is_used_without(driver, monkeypatch):
    monkeypatch.setattr(allocator, "_AddedOption", type("_AddedOption", (), {"variable": None, "before": ""}))
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda text: driver.failures.clear())
    allocator.configure()
    driver.fail(kernel=RuntimeError("CUDA driver error: operation not supported"))
    assert device.pick_device("auto") == CUDA0 and driver.ran == [CUDA0]
    assert allocator.detect_segments() == "native"
    driver.fail(kernel=RuntimeError("CUDA driver error: operation not supported"))
    with pytest.raises(DeviceFailed):
        device.pick_device("auto")
    os.environ.pop(allocator.COMMON_VARIABLE, None)


def test_an_old_driver_is_one_line_where_auto_goes_to_the_cpu(driver):
    """torch's own warning, which it emits when it counts devices, is suppressed."""
    driver.fail(count=RuntimeError(TOO_OLD), init=RuntimeError(TOO_OLD))
    with warnings.catch_warnings(record=True) as warned, cuda.suppress_start_warnings():
        found = machine.inspect_machine(request())
        told = machine.build_cpu_notice(found, 7322.0)
    assert warned == [] and found.device.type == "cpu" and len(told.splitlines()) == 1
    assert told.startswith("This runs on the CPU and takes about 2 h 02 min: The NVIDIA driver on your system is too ")
    assert told.endswith(torch_errors.HINT_UPDATE_DRIVER)
    too_old = pytest.raises(Unavailable, match=r"--device cuda .*: The NVIDIA driver .* too old")
    with too_old, cuda.suppress_start_warnings():
        device.pick_device("cuda")


@pytest.mark.parametrize(
    "text",
    [
        f"CUDA initialization: {TOO_OLD}",
        "Can't initialize NVML",
        "Found GPU0 A card which is of compute capability (CC) 6.1.\nThe following list shows the CCs",
        "\nA card with CUDA capability sm_61 is not compatible with the current PyTorch installation.\nThe current",
    ],
)
def test_what_torch_warns_of_at_its_start_is_not_shown(text):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with cuda.suppress_start_warnings():
            warnings.warn(text, stacklevel=1)
            warnings.warn("another", stacklevel=1)
    assert [str(one.message) for one in warned] == ["another"]


PROC = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: 12\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)\n"


@pytest.mark.parametrize(
    ("release", "version", "index"),
    [
        ("2.13.0+cpu", PROC, "cu126"),
        ("2.13.0+cpu", OPEN, "cu130"),
        ("2.8.0", OPEN, "cu126"),
        ("2.9.1", OPEN, "cu130"),
        ("2.10.0", OPEN, "cu130"),
        ("2.13.0", None, "cu126"),
    ],
)
def test_a_card_that_torch_is_not_built_for_gets_the_command_to_install_one(
    driver, no_nvidia, monkeypatch, release, version, index
):
    driver.built_for()
    driver.count = 0
    monkeypatch.setattr(torch, "__version__", release)
    found = machine.inspect_machine(request())
    assert found.no_gpu == (f"this build of torch ({release}) has no CUDA", "")
    (no_nvidia / "gpus").mkdir()
    if version is not None:
        (no_nvidia / "version").write_text(version)
    command = f"pip install --force-reinstall torch=={release.split('+')[0]} --index-url {no_gpu.WHEELS_URL}/{index}"
    told = machine.build_cpu_notice(machine.inspect_machine(request()), 3.0)
    assert "has no CUDA, but" in told and told.endswith(command)
    with pytest.raises(Unavailable) as refused:
        device.pick_device("cuda")
    assert str(refused.value).endswith(command)


def test_nvidia_smi_alone_tells_of_a_card(driver, no_nvidia, monkeypatch):
    assert not no_gpu.has_nvidia_gpu()
    monkeypatch.setattr(no_gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert no_gpu.has_nvidia_gpu()
    assert no_nvidia / "version" == no_gpu.DRIVER_VERSION and no_gpu.read_driver_major() == 0


def test_without_a_card_only_a_long_run_is_told_of(driver, no_nvidia):
    driver.count = 0
    driver.fail(init=RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"))
    found = machine.inspect_machine(request())
    assert "Found no NVIDIA driver" in machine.build_cpu_notice(found, 61.0)
    driver.built_for()
    found = machine.inspect_machine(request())
    assert machine.build_cpu_notice(found, 59.0) is None and machine.build_cpu_notice(found, 61.0) is not None
    asked = machine.inspect_machine(request(device="cpu"))
    assert machine.build_cpu_notice(asked, 1e6) is None


def test_bfloat16_on_a_card_without_it_is_usage(driver):
    assert device.pick_dtype("bfloat16", CUDA0) == torch.bfloat16
    driver.has_bf16 = False
    with pytest.raises(UsageError, match="--dtype bfloat16 .* cuda:0") as refused:
        machine.inspect_machine(request(dtype="bfloat16"))
    assert (refused.value.exit_code, refused.value.setting) == (2, "dtype")
    assert machine.inspect_machine(request()).vae_dtype == torch.float32


@pytest.mark.parametrize(
    "text",
    ["CUDA error: operation not supported", "CUDA error: operation not permitted", "HIP error: invalid argument"],
)
def test_where_the_driver_does_not_say_what_is_free_all_but_our_own_counts(driver, text):
    driver.reserved, driver.allocated = 3 * GIB, GIB
    assert cuda.free_device_bytes(CUDA0) == FREE_BYTES + 2 * GIB
    driver.fail(free=RuntimeError(f"{text}{MORE}"))
    assert cuda.free_device_bytes(CUDA0) == TOTAL_BYTES - GIB


def test_a_card_that_is_lost_is_not_taken_for_one_that_does_not_say(driver):
    driver.fail(free=RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(RuntimeError, match="launch failure"):
        cuda.free_device_bytes(CUDA0)


def test_the_share_that_the_user_gives_to_torch_is_kept(driver, monkeypatch):
    monkeypatch.setenv(allocator.COMMON_VARIABLE, "per_process_memory_fraction:0.5")
    monkeypatch.setattr(allocator, "_torch_version", lambda: "2.13.0")
    driver.allocated = GIB
    assert cuda.free_device_bytes(CUDA0) == TOTAL_BYTES // 2 - GIB
    for vram in (None, 6 * GIB, 20 * GIB):
        cuda.limit_device_memory(CUDA0, vram)
    assert driver.limits == [(0.5, 0), (0.25, 0), (0.5, 0)]


def test_fp32_is_fp32_in_convolutions_too():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        cuda.forbid_tf32()
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        if hasattr(torch.backends.cudnn, "conv"):  # since torch 2.9
            assert torch.backends.cudnn.conv.fp32_precision != "tf32" != torch.backends.cuda.matmul.fp32_precision
        with torch.backends.cudnn.flags(enabled=True):  # fails if both kinds of settings are used
            pass
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_a_run_forbids_tf32(cli, xl_model, monkeypatch):
    called = []
    monkeypatch.setattr("linfusion_cli.run.stages.load.forbid_tf32", lambda: called.append(True))
    options = ["generate", "x", "--model", xl_model, "--size", 64, "--steps", 1, "-o", "a.png"]
    assert cli(*options)[0] == 0 and called == [True]


def test_a_report_names_the_platform(driver):
    names = []
    for platform in ({"cuda": "12.8"}, {"hip": "6.4.1"}):
        driver.built_for(**platform)
        names.append(versions.describe_machine(CUDA0)["platform"])
    assert names == ["CUDA 12.8", "ROCm 6.4.1"] and versions.describe_machine(torch.device("cpu"))["platform"] == "CPU"


def test_the_notice_is_shown_once_and_kept_off_stdout(cli, xl_model, monkeypatch, tmp_path):
    monkeypatch.setattr(no_gpu, "NVIDIA_PATHS", (Path("/"),))
    options = ["generate", "x", "--model", xl_model, "--size", 64, "--steps", 1]
    code, out, err = cli(*options, "-o", "a.png")
    assert (code, out) == (0, "a.png\n") and err.count("This runs on the CPU and takes about ") == 1
    assert "This runs on the CPU" not in cli(*options, "-o", "b.png", "--device", "cpu")[2]
