"""torch's allocator is configured before torch is imported: beside what the user asked for, and never against it."""

import json
import os
import subprocess
import sys

import pytest

from linfusion_cli.core.errors import UsageError
from linfusion_cli.hardware import allocator

OLD, HIP, NEW = allocator.VARIABLES
TRUE = "expandable_segments:True"


@pytest.fixture
def torch_is(monkeypatch):
    """Make another release of torch the installed one, in an environment without its options."""
    for name in allocator.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "_Added", type("_Added", (), {"variable": None, "before": ""}))

    def install(release: str) -> None:
        monkeypatch.setattr(allocator, "_torch_version", lambda: release)

    install("2.13.0+cu130")
    return install


def options() -> dict[str, str]:
    return {name: os.environ[name] for name in allocator.VARIABLES if name in os.environ}


@pytest.mark.parametrize(
    ("release", "before", "after"),
    [
        ("2.13.0+cu130", {}, {NEW: TRUE}),
        ("2.10.0", {}, {NEW: TRUE}),
        ("2.9.1+cu128", {}, {OLD: TRUE}),  # which takes it from no other
        ("2.6.0", {}, {OLD: TRUE}),
        ("2.13.0", {NEW: "max_split_size_mb:128"}, {NEW: f"max_split_size_mb:128,{TRUE}"}),
        ("2.13.0", {OLD: "max_split_size_mb:128"}, {OLD: f"max_split_size_mb:128,{TRUE}"}),
        ("2.13.0", {OLD: "", NEW: "max_split_size_mb:128"}, {OLD: TRUE, NEW: "max_split_size_mb:128"}),
        ("2.13.0", {HIP: "a:1", NEW: "b:2"}, {HIP: f"a:1,{TRUE}", NEW: "b:2"}),
        ("2.9.0", {NEW: "max_split_size_mb:128"}, {NEW: "max_split_size_mb:128", OLD: f"max_split_size_mb:128,{TRUE}"}),
        ("2.8.0", {NEW: "max_split_size_mb:128"}, {NEW: "max_split_size_mb:128", OLD: TRUE}),  # which does not know it
        ("2.13.0", {NEW: " max_split_size_mb : 128, "}, {NEW: f" max_split_size_mb : 128,{TRUE}"}),
        (
            "2.13.0",
            {NEW: "roundup_power2_divisions:[256:1,>:2]"},
            {NEW: f"roundup_power2_divisions:[256:1,>:2],{TRUE}"},
        ),
        ("2.13.0", {NEW: "backend:native"}, {NEW: f"backend:native,{TRUE}"}),
    ],
)
def test_expandable_segments_are_added_where_torch_reads_them(torch_is, monkeypatch, release, before, after):
    torch_is(release)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    assert allocator.segments() == "native"
    allocator.configure()
    assert options() == after and allocator.segments() == "expandable"


@pytest.mark.parametrize(
    ("release", "before", "segments"),
    [
        ("2.13.0", {NEW: "expandable_segments:False"}, "native"),
        ("2.13.0", {NEW: "max_split_size_mb:64,expandable_segments: False"}, "native"),
        ("2.13.0", {OLD: TRUE}, "expandable"),
        ("2.13.0", {NEW: f"{TRUE},expandable_segments:False"}, "native"),
        ("2.13.0", {OLD: "backend:cudaMallocAsync"}, "native"),
        ("2.13.0", {OLD: f"backend:cudaMallocAsync,{TRUE}"}, "native"),
        ("2.9.1", {NEW: TRUE}, "native"),
        ("2.13.0", {NEW: "nonsense"}, "native"),
        ("2.13.0", {NEW: "max_split_size_mb"}, "native"),
        ("2.13.0", {NEW: "a:[1,2"}, "native"),
        ("2.7.1+rocm6.3", {}, "native"),
        ("", {}, "native"),  # no torch
    ],
)
def test_what_the_user_has_chosen_stays(torch_is, monkeypatch, release, before, segments):
    torch_is(release)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    allocator.configure()
    assert options() == before and allocator.segments() == segments


def test_platforms_without_expandable_segments_are_left_alone(torch_is, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    allocator.configure()
    assert options() == {} and allocator.segments() == "native"
    monkeypatch.setenv(NEW, TRUE)
    assert allocator.segments() == "native"


@pytest.mark.parametrize(
    ("value", "share"), [("", 1.0), ("per_process_memory_fraction:0.5", 0.5), ("per_process_memory_fraction:x", 1.0)]
)
def test_the_share_that_the_user_gives_to_torch_is_known(torch_is, monkeypatch, value, share):
    monkeypatch.setenv(NEW, value)
    assert allocator.share() == share


# What torch 2.13 raises for these options, or an older one.
COMPLAINTS = [
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


@pytest.mark.parametrize("error", COMPLAINTS, ids=str)
def test_options_that_torch_does_not_understand_are_usage(torch_is, monkeypatch, error):
    assert allocator.complaint(error) is None  # nothing is set
    monkeypatch.setenv(NEW, "nonsense")
    found = allocator.complaint(error)
    assert isinstance(found, UsageError) and f"{NEW}='nonsense'" in str(found) and len(str(found).splitlines()) == 1
    assert allocator.complaint(RuntimeError("CUDA error: out of memory")) is None


# torch reads the options when it is first asked for them: here, each time in a child of its own.
READS = """
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


@pytest.mark.skipif(allocator.torch_release() < (2, 12), reason="this torch does not tell what it has read")
@pytest.mark.skipif(sys.platform != "linux", reason="there are expandable segments on Linux only")
def test_the_installed_torch_reads_them_so():
    large, small = "max_split_size_mb:128", "max_split_size_mb:64"
    environments = [{}, {NEW: large}, {OLD: large}, {OLD: large, NEW: small}, {OLD: "", NEW: small}]
    environments += [{HIP: large, NEW: small}]
    clean = {name: value for name, value in os.environ.items() if name not in allocator.VARIABLES}
    command = [sys.executable, "-c", READS, json.dumps(environments)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert told[::2] == ["", large, large, large, "", large] and done.stderr == ""
    assert told[1::2] == [f"{alone},{TRUE}" if alone else TRUE for alone in told[::2]]


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
def test_where_the_driver_refuses_expandable_segments_torch_does_without(torch_is, monkeypatch, text):
    given = []
    monkeypatch.setattr("torch._C._accelerator_setAllocatorSettings", given.append, raising=False)
    monkeypatch.setenv(NEW, "max_split_size_mb:128")
    assert not allocator.fall_back(RuntimeError(text))  # nothing was added
    allocator.configure()
    assert not allocator.fall_back(RuntimeError("CUDA error: unknown error"))
    assert allocator.fall_back(RuntimeError(text)) and allocator.segments() == "native"
    assert given == [os.environ[NEW]] == ["max_split_size_mb:128,expandable_segments:False"]
    assert not allocator.fall_back(RuntimeError(text))  # once
