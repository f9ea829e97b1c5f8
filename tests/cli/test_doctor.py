"""`linfusion doctor` works with any GPU error, and every command reports the error in one line."""

import builtins
import json
import os
import subprocess
import sys

import pytest
import torch

from linfusion_cli.hardware import allocator
from tests.hardware.stub_driver import StubDriver
from tests.hardware.test_cuda_start import FAULTS, TOO_OLD


@pytest.fixture
def driver(monkeypatch):
    for name in (*allocator.VARIABLES, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return StubDriver(monkeypatch)


def read_cuda_line(cli) -> str:
    """Run doctor and return its line on GPUs."""
    code, out, err = cli("doctor", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)["cuda"]


def test_gpus_are_listed_with_memory_and_platform(cli, driver, monkeypatch):
    assert read_cuda_line(cli) == "CUDA 12.8, native segments: A card, 24.0 GiB; A card, 24.0 GiB"
    driver.built_for(hip="6.4.1")
    assert read_cuda_line(cli) == "ROCm 6.4.1, native segments: A card, 24.0 GiB; A card, 24.0 GiB"


@pytest.mark.parametrize("text", [text for text, _ in FAULTS.values()], ids=list(FAULTS))
def test_an_unusable_gpu_is_listed_with_the_reason(cli, driver, text):
    driver.fail(kernel=torch.AcceleratorError(text))
    line = read_cuda_line(cli)
    assert line.count(f"cannot be used: {text.splitlines()[0].rstrip('.')}.") == 2 and "\n" not in line


def test_an_old_driver_is_reported_with_the_reason(cli, driver):
    driver.fail(count=RuntimeError(TOO_OLD), init=RuntimeError(TOO_OLD))
    assert read_cuda_line(cli).startswith("none: The NVIDIA driver on your system is too old (found version 11040).")


def test_a_variable_that_hides_all_gpus_is_named(cli, driver, monkeypatch):
    driver.count = 0
    driver.fail(init=RuntimeError("No CUDA GPUs are available"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert read_cuda_line(cli).startswith("none: CUDA_VISIBLE_DEVICES='' hides all GPUs. Unset CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize("name", ["is_available", "device_count", "get_device_properties"])
def test_an_error_of_any_query_is_reported(cli, driver, monkeypatch, name):
    def fails(*_: object) -> None:
        raise RuntimeError("HIP_VISIBLE_DEVICES contains more devices than ROCR_VISIBLE_DEVICES\nmore")

    monkeypatch.setattr(torch.cuda, name, fails)
    assert read_cuda_line(cli) == (
        "none: torch failed (HIP_VISIBLE_DEVICES contains more devices than ROCR_VISIBLE_DEVICES)"
    )


def test_a_torch_that_cannot_be_imported_is_reported(cli, monkeypatch):
    imported = builtins.__import__

    def fails(name, *rest):
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file: No such file or directory")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fails)
    assert read_cuda_line(cli).startswith("none: torch failed (libcudart.so.12: cannot open shared object file")


@pytest.mark.parametrize("command", ["generate", "plan"])
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_run_on_an_unusable_gpu_is_69(cli, driver, tmp_path, command, name):
    driver.fail(kernel=torch.AcceleratorError(FAULTS["no kernel"][0]))
    code, out, err = cli(command, "x", "--model", "demo", "--size", 64, "--device", name)
    lines = [line for line in err.splitlines() if " linfusion: " in line]
    assert (code, out) == (69, "") and len(lines) == 1 and "no kernel image is available" in lines[0]
    assert "Traceback" not in err and list(tmp_path.iterdir()) == []


def test_bfloat16_on_a_gpu_without_it_is_2(cli, driver):
    driver.has_bf16 = False
    code, _, err = cli("generate", "x", "--model", "demo", "--size", 64, "--dtype", "bfloat16")
    assert code == 2 and "--dtype bfloat16" in err and "cuda:0" in err


OLD_DRIVER = """
import sys, warnings, torch
from linfusion_cli.cli import app
TOO_OLD = sys.argv.pop(1)
def count():
    warnings.warn("CUDA initialization: " + TOO_OLD)
    return 0
def start():
    raise RuntimeError(TOO_OLD)
torch._C._cuda_getCurrentRawStream = None  # a library imports it if there is a driver
torch.version.cuda, torch._C._cuda_getDeviceCount, torch.cuda._lazy_init = "12.8", count, start
app.main()
"""


@pytest.mark.slow
def test_an_old_driver_is_one_line_without_warnings_of_torch(tmp_path, xl_model):
    """Run in a separate process, with everything that torch and other libraries print."""
    options = ["generate", "x", "--model", str(xl_model), "--size", "64", "--steps", "1", "-o", "a.png"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    done = subprocess.run(
        [sys.executable, "-c", OLD_DRIVER, TOO_OLD, *options],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "too old" in line]
    assert (done.returncode, done.stdout) == (0, "a.png\n") and len(lines) == 1
    assert "linfusion: This runs on the CPU and takes about" in lines[0] and "Warning" not in done.stderr
