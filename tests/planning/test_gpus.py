"""Plans for GPUs that this machine does not have: names, rates, dtypes and budgets."""

from dataclasses import replace
from math import isnan

import pytest
import torch

from linfusion_cli.core.errors import Unavailable, UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.locate.published import get_configs, get_linfusion_config
from linfusion_cli.planning import assumed_gpu, machine
from linfusion_cli.planning.assumed_gpu import choose_machine
from linfusion_cli.planning.estimate import CostEstimator, DenoiseStrategy
from linfusion_cli.planning.gpus import GPUS, UNKNOWN_GPU, find_gpu
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.planning.plan import STRIP_SIZES
from tests.planning.test_plan import GIB, build_request

# Seconds of one forward of SDXL at 16384², from its 1,547 TFLOP: a lower bound without elementwise work.
FORWARD_SEC = {"h200": 2.0, "a100": 5.7, "rtx4090": 9.3}


def request(**values):
    return build_request(Size(64, 64), **{"device": "cuda", "vram": 8 * GIB} | values)


@pytest.mark.parametrize(
    "name", ["rtx4090", "RTX 4090", "rtx-4090", "RTX_4090", "GeForce RTX 4090", "NVIDIA GeForce RTX 4090"]
)
def test_case_spaces_dashes_and_the_maker_are_ignored(name):
    assert find_gpu(name) is GPUS["rtx4090"]


def test_every_gpu_is_found_by_its_key_and_its_name():
    for key, gpu in GPUS.items():
        assert find_gpu(key) is find_gpu(gpu.name) is gpu


@pytest.mark.parametrize(("name", "nearest"), [("rtx4091", "rtx4090"), ("h1000", "h100"), ("A100-40", "a100-40g")])
def test_an_unknown_name_is_refused_with_the_nearest_one_and_the_list(name, nearest):
    with pytest.raises(UsageError) as refused:
        find_gpu(name)
    assert f"Did you mean {nearest}?" in refused.value.hint and all(key in refused.value.hint for key in GPUS)


@pytest.mark.parametrize("name", ["", "   ", "\udcff", "x" * 100_000])
def test_a_name_that_resembles_none_is_refused_with_the_list(name):
    with pytest.raises(UsageError) as refused:
        find_gpu(name)
    assert refused.value.hint.startswith("Known are ")


def test_the_figures_of_all_gpus_are_plausible():
    for gpu in GPUS.values():
        assert 8 <= gpu.memory_gib <= 200 and 0.8 * gpu.memory_bytes < gpu.default_budget_bytes < gpu.memory_bytes
        assert 1.5 < gpu.half_tflops / gpu.single_tflops < 31
        assert 20 < 1000 * gpu.half_tflops / gpu.memory_gb_per_sec < 480  # FLOP per byte


@pytest.fixture(scope="module")
def sdxl():
    model = Model(get_configs("sdxl"))
    return read_facts(model), MetaModel.read(model, get_linfusion_config("sdxl"))


@pytest.mark.parametrize("name", FORWARD_SEC)
def test_a_forward_of_sdxl_at_16k_takes_about_the_time_of_its_products(sdxl, name):
    gpu = find_gpu(name)
    on = choose_machine(request(vram=gpu.default_budget_bytes), gpu)
    strategy = DenoiseStrategy("linear", STRIP_SIZES["cuda"][0])
    estimate = CostEstimator(*sdxl, on).estimate_forward(strategy, Size(16384, 16384))
    assert FORWARD_SEC[name] / 1.5 <= estimate.seconds <= FORWARD_SEC[name] * 1.5


def test_maps_on_the_host_are_limited_by_the_gpus_connection(sdxl):
    """The same GPU with half the lanes takes twice as long if copies take longer than the computation."""
    gpu = replace(GPUS["b200"], copy_bytes_per_sec=10e9)
    slower = replace(gpu, copy_bytes_per_sec=5e9)
    strategy = DenoiseStrategy("linear", STRIP_SIZES["cuda"][0], "host")
    estimates = [
        CostEstimator(*sdxl, choose_machine(request(), each)).estimate_forward(strategy, Size(16384, 16384))
        for each in (gpu, slower)
    ]
    assert estimates[1].seconds == pytest.approx(2 * estimates[0].seconds)


def test_dtypes_are_those_of_the_real_gpu():
    for name, vae in (("t4", torch.float32), ("v100", torch.float32), ("l4", torch.bfloat16)):
        on = choose_machine(request(), find_gpu(name))
        assert (on.dtype, on.vae_dtype) == (torch.float16, vae)
    wide = choose_machine(request(dtype="float32"), find_gpu("l4"))
    assert (wide.dtype, wide.vae_dtype) == (torch.float32, torch.float32)
    assert wide.speed.flops_per_sec < choose_machine(request(), find_gpu("l4")).speed.flops_per_sec / 3
    with pytest.raises(UsageError, match="bfloat16 is not supported by the NVIDIA T4"):
        choose_machine(request(dtype="bfloat16"), find_gpu("t4"))


def test_a_budget_above_the_memory_is_refused():
    gpu = find_gpu("rtx3060")
    assert choose_machine(request(vram=gpu.memory_bytes), gpu).device_bytes == gpu.memory_bytes
    with pytest.raises(UsageError, match="more than the NVIDIA GeForce RTX 3060 has. Use at most 12GiB"):
        choose_machine(request(vram=gpu.memory_bytes + 1), gpu)


def test_a_named_gpu_is_assumed_on_a_machine_with_a_gpu_too(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr(assumed_gpu, "inspect_machine", lambda _: pytest.fail("no GPU may be started"))
    on = choose_machine(request(), find_gpu("a100"))
    assert on.assumed_gpu is GPUS["a100"] and on.segments == "expandable"


def test_only_a_gpu_that_this_machine_does_not_have_is_assumed(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(assumed_gpu, "inspect_machine", lambda _: "this machine")
    assert [choose_machine(request(device=name), None) for name in ("cuda", "cuda:1")] == ["this machine"] * 2
    absent = choose_machine(request(device="cuda:2"), None)
    assert absent.assumed_gpu is UNKNOWN_GPU and isnan(absent.speed.estimate_seconds(1e12, 1e9))
    with pytest.raises(Unavailable, match="cuda:2 is not available.*Add --vram 24GiB or --gpu rtx4090"):
        choose_machine(request(device="cuda:2", vram=None), None)


def test_the_host_budget_is_that_of_this_machine_or_of_ram(monkeypatch):
    monkeypatch.setattr(machine, "free_host_bytes", lambda: 10 * GIB)
    on = choose_machine(request(), UNKNOWN_GPU)
    assert on.host_bytes == on.resident_bytes + 9 * GIB
    assert choose_machine(request(ram=5 * GIB), UNKNOWN_GPU).host_bytes == 5 * GIB
