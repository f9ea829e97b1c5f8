"""The allocator is configured before torch is imported, in addition to the user's options and never against them."""

import json
import os
import subprocess
import sys

import pytest

from linfusion_cli.core.errors import UsageError
from linfusion_cli.hardware import allocator

CUDA, HIP, COMMON = allocator.VARIABLES
TRUE = "expandable_segments:True"
SPLIT = "max_split_size_mb:128"


@pytest.fixture
def simulate_release(monkeypatch):
    """Simulate another installed torch release, in an environment without allocator options."""
    for name in allocator.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "_AddedOption", type("_AddedOption", (), {"variable": None, "before": ""}))

    def install(release: str) -> None:
        monkeypatch.setattr(allocator, "_torch_version", lambda: release)

    install("2.13.0+cu130")
    return install


def options() -> dict[str, str]:
    return {name: os.environ[name] for name in allocator.VARIABLES if name in os.environ}


@pytest.mark.parametrize(
    ("release", "before", "after"),
    [
        ("2.13.0+cu130", {}, {COMMON: TRUE}),
        ("2.10.0", {}, {COMMON: TRUE}),
        ("2.9.1+cu128", {}, {CUDA: TRUE}),  # it reads this option from no other variable
        ("2.6.0", {}, {CUDA: TRUE}),
        ("2.13.0", {COMMON: "max_split_size_mb:128"}, {COMMON: f"max_split_size_mb:128,{TRUE}"}),
        ("2.13.0", {CUDA: "max_split_size_mb:128"}, {CUDA: f"max_split_size_mb:128,{TRUE}"}),
        ("2.13.0", {CUDA: "", COMMON: "max_split_size_mb:128"}, {CUDA: TRUE, COMMON: "max_split_size_mb:128"}),
        ("2.13.0", {HIP: "a:1", COMMON: "b:2"}, {HIP: f"a:1,{TRUE}", COMMON: "b:2"}),
        (
            "2.9.0",
            {COMMON: "max_split_size_mb:128"},
            {COMMON: "max_split_size_mb:128", CUDA: f"max_split_size_mb:128,{TRUE}"},
        ),
        (
            "2.8.0",
            {COMMON: "max_split_size_mb:128"},
            {COMMON: "max_split_size_mb:128", CUDA: TRUE},
        ),  # it does not read the new variable
        ("2.13.0", {COMMON: " max_split_size_mb : 128, "}, {COMMON: f" max_split_size_mb : 128,{TRUE}"}),
        (
            "2.13.0",
            {COMMON: "roundup_power2_divisions:[256:1,>:2]"},
            {COMMON: f"roundup_power2_divisions:[256:1,>:2],{TRUE}"},
        ),
        ("2.13.0", {COMMON: "backend:native"}, {COMMON: f"backend:native,{TRUE}"}),
    ],
)
def test_expandable_segments_are_added_where_torch_reads_them(simulate_release, monkeypatch, release, before, after):
    simulate_release(release)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    assert allocator.detect_segments() == "native"
    allocator.configure()
    assert options() == after and allocator.detect_segments() == "expandable"


@pytest.mark.parametrize(
    ("release", "before", "segments"),
    [
        ("2.13.0", {COMMON: "expandable_segments:False"}, "native"),
        ("2.13.0", {COMMON: "max_split_size_mb:64,expandable_segments: False"}, "native"),
        ("2.13.0", {CUDA: TRUE}, "expandable"),
        ("2.13.0", {COMMON: f"{TRUE},expandable_segments:False"}, "native"),
        ("2.13.0", {CUDA: "backend:cudaMallocAsync"}, "native"),
        ("2.13.0", {CUDA: f"backend:cudaMallocAsync,{TRUE}"}, "native"),
        ("2.9.1", {COMMON: TRUE}, "native"),
        ("2.13.0", {COMMON: "nonsense"}, "native"),
        ("2.13.0", {COMMON: "max_split_size_mb"}, "native"),
        ("2.13.0", {COMMON: "a:[1,2"}, "native"),
        ("2.7.1+rocm6.3", {}, "native"),
        ("", {}, "native"),  # no torch
    ],
)
def test_what_the_user_has_chosen_stays(simulate_release, monkeypatch, release, before, segments):
    simulate_release(release)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    allocator.configure()
    assert options() == before and allocator.detect_segments() == segments


def test_platforms_without_expandable_segments_are_left_alone(simulate_release, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    allocator.configure()
    assert options() == {} and allocator.detect_segments() == "native"
    monkeypatch.setenv(COMMON, TRUE)
    assert allocator.detect_segments() == "native"


@pytest.mark.parametrize(
    ("value", "share"), [("", 1.0), ("per_process_memory_fraction:0.5", 0.5), ("per_process_memory_fraction:x", 1.0)]
)
def test_the_share_that_the_user_gives_to_torch_is_known(simulate_release, monkeypatch, value, share):
    monkeypatch.setenv(COMMON, value)
    assert allocator.memory_fraction() == share


# Errors of torch 2.13 and older releases for invalid options.
OPTION_ERRORS = [
    RuntimeError('i < config_.size() INTERNAL ASSERT FAILED at "AllocatorConfig.h":124. Index out of bounds'),
    ValueError("Expected 'True' or 'False' at index 2 in ConfigTokenizer but got 'true'"),
    ValueError("stoull"),
    ValueError("CachingAllocator option max_split_size_mb too small, must be >= 20"),
    ValueError("Unrecognized key 'nonsense' in CUDA allocator config."),
    RuntimeError("Unrecognized CachingAllocator option: nonsense"),
    RuntimeError("Error parsing CachingAllocator settings, expected :"),
    RuntimeError("Unknown allocator backend, options are native and cudaMallocAsync"),
    RuntimeError("Expected a single True/False argument for expandable_segments"),
    RuntimeError("garbage_collect_threshold is invalid, set it in (0.0, 1.0)"),
    RuntimeError("For roundups, the divisions has to be power of 2"),
    RuntimeError("Error, expecting max_split_size_mb value"),
]


@pytest.mark.parametrize("error", OPTION_ERRORS, ids=str)
def test_options_that_torch_does_not_understand_are_usage(simulate_release, monkeypatch, error):
    assert allocator.translate_option_error(error) is None  # nothing is set
    monkeypatch.setenv(COMMON, "nonsense")
    usage = allocator.translate_option_error(error)
    assert isinstance(usage, UsageError) and f"{COMMON}='nonsense'" in str(usage) and len(str(usage).splitlines()) == 1
    assert allocator.translate_option_error(RuntimeError("CUDA error: out of memory")) is None


# torch reads the options once per process, so each environment has its own child process.
READ_OPTIONS = """
import json, os, sys, torch
from linfusion_cli.hardware import allocator
for environment in json.loads(sys.argv[1]):
    for configures in (False, True):
        if os.fork() == 0:
            os.environ.update(environment)
            if configures:
                allocator.configure()
            print(json.dumps(torch._C._accelerator_getAllocatorSettings()), flush=True)
            os._exit(0)
        os.wait()
"""


@pytest.mark.skipif(allocator.torch_release() < (2, 12), reason="this torch does not report its options")
@pytest.mark.skipif(sys.platform != "linux", reason="expandable segments exist on Linux only")
def test_the_installed_torch_reads_them_so():
    large, small = "max_split_size_mb:128", "max_split_size_mb:64"
    environments = [{}, {COMMON: large}, {CUDA: large}, {CUDA: large, COMMON: small}, {CUDA: "", COMMON: small}]
    environments += [{HIP: large, COMMON: small}]
    clean = {name: value for name, value in os.environ.items() if name not in allocator.VARIABLES}
    command = [sys.executable, "-c", READ_OPTIONS, json.dumps(environments)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    reported = [json.loads(line) for line in done.stdout.splitlines()]
    assert reported[::2] == ["", large, large, large, "", large] and done.stderr == ""
    assert reported[1::2] == [f"{alone},{TRUE}" if alone else TRUE for alone in reported[::2]]


def test_the_program_configures_torch_before_it_imports_it(tmp_path):
    code = (
        "import sys, json, os\nfrom linfusion_cli import __main__, cli\nfrom linfusion_cli.cli import app\n"
        "app.main = lambda: print(json.dumps([os.environ.get('PYTORCH_ALLOC_CONF'), 'torch' in sys.modules]))\n"
        "__main__.main()"
    )
    clean = {name: value for name, value in os.environ.items() if name not in allocator.VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [TRUE, False]


@pytest.mark.parametrize("text", ["CUDA driver error: operation not supported", "CUDA driver error: not supported"])
def test_where_the_driver_refuses_expandable_segments_torch_does_without(simulate_release, monkeypatch, text):
    applied = []
    monkeypatch.setattr("torch._C._accelerator_setAllocatorSettings", applied.append, raising=False)
    monkeypatch.setenv(COMMON, "max_split_size_mb:128")
    assert not allocator.disable_expandable_segments(RuntimeError(text))  # nothing was added
    allocator.configure()
    assert not allocator.disable_expandable_segments(RuntimeError("CUDA error: unknown error"))
    assert allocator.disable_expandable_segments(RuntimeError(text)) and allocator.detect_segments() == "native"
    assert applied == [os.environ[COMMON]] == ["max_split_size_mb:128,expandable_segments:False"]
    assert not allocator.disable_expandable_segments(RuntimeError(text))  # once
