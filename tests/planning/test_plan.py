"""Strategies are chosen for a budget; the error for an insufficient budget names a sufficient one."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from linfusion_cli.core.errors import DataError, OutOfMemoryBudget
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.units import parse_bytes
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.locate.model import DEMO_FOLDER
from linfusion_cli.planning.machine import Machine
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.planning.plan import MARGIN_BYTES, STRIP_SIZES, Plan, PlanInputs, make_plan
from linfusion_cli.planning.speed import Speed
from linfusion_cli.run.inputs.resolve import resolve_request
from linfusion_cli.run.stages.plan import plan_run
from linfusion_cli.sampling.phases import PhaseSizes, build_phases
from linfusion_cli.sampling.upscalers.pass_count import count_passes
from linfusion_cli.settings.request import Request
from tests.support.requests import make_request

GIB = 1 << 30
SIZES = [Size(256, 256), Size(8192, 8192)]


def machine(kind: str, host_bytes: int, device_bytes: int | None = None) -> Machine:
    """Return a CPU or GPU with these budgets."""
    speed = Speed(1e12, 1e10)
    dtype = torch.float32 if kind == "cpu" else torch.float16
    return Machine(torch.device(kind), dtype, torch.float32, host_bytes, device_bytes, GIB // 2, speed, speed)


def build_request(size: Size, **changed) -> Request:
    """Return a request for the demo model, with the settings `changed`."""
    values = {"prompt": "a hill", "size": size, "output": Path("a.tif"), "model": "demo"}
    return make_request(**values | changed)


@cache
def demo_meta_model() -> MetaModel:
    """Return the demo model on the meta device, cached, as plans do not modify it."""
    return MetaModel.read(Model(DEMO_FOLDER), DEMO_FOLDER / "linfusion")


def plan(on: Machine, attentions=("original", "linear"), meta_model: MetaModel | None = None, **settings) -> Plan:
    """Plan two phases of the demo model, from 256² to 8192²."""
    sizes = [SIZES[0], settings.pop("size", SIZES[-1])]
    request = build_request(sizes[-1], attention=attentions, steps=(4,), strength=(0.5,), **settings)
    phases = build_phases(request, PhaseSizes(sizes, SIZES[0], SIZES[0], SIZES[0], from_noise=True))
    facts = read_facts(Model(DEMO_FOLDER))
    passes = [count_passes(request, facts.scheduler_config, phase) for phase in phases]
    return make_plan(PlanInputs(request, facts, phases, passes), meta_model or demo_meta_model(), on)


def test_a_cpu_with_enough_memory_uses_the_best_strips_for_linear_attention_only():
    found = plan(machine("cpu", 64 * GIB))
    assert [(stage.kind, stage.phase) for stage in found.stages] == [
        ("denoise", 0),
        ("decode", 0),
        ("start", 1),
        ("denoise", 1),
        ("decode", 1),
    ]
    assert found.find_stage("denoise", 0).strategy.strips is None
    assert found.find_stage("denoise", 1).strategy.strips == STRIP_SIZES["cpu"][0]
    assert found.estimate.seconds == pytest.approx(sum(stage.estimate.seconds for stage in found.stages))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_budget_named_in_the_error_is_the_minimum(kind):
    def on(budget):
        return machine("cpu", budget) if kind == "cpu" else machine("cuda", 64 * GIB, budget)

    with pytest.raises(OutOfMemoryBudget) as refused:
        plan(on(GIB // 8))
    flag = "--ram" if kind == "cpu" else "--vram"
    assert refused.value.exit_code == 71 and flag in refused.value.hint
    named = parse_bytes(refused.value.hint.split()[2])
    plan(on(named))
    margin = MARGIN_BYTES if kind == "cpu" else 0
    with pytest.raises(OutOfMemoryBudget):
        plan(on(named - margin - GIB // 10))  # the named value is rounded up to one decimal


LARGER_BYTES = 50 << 20  # a second process can be this much larger than the one that named a budget


@pytest.mark.parametrize(
    ("flag", "on"),
    [
        ("--ram", lambda budget: machine("cpu", budget)),
        ("--ram", lambda budget: machine("cuda", budget, 16 * GIB)),
        ("--vram", lambda budget: machine("cuda", 64 * GIB, budget)),
    ],
    ids=["cpu", "cuda, host", "cuda, card"],
)
def test_the_budget_that_is_named_is_enough_for_a_second_process_which_is_somewhat_larger(flag, on):
    """Use several sizes of the first process, because rounding up can hide a missing margin."""
    for resident in range(300 << 20, 400 << 20, 25 << 20):
        with pytest.raises(OutOfMemoryBudget) as refused:
            plan(replace(on(GIB // 8), resident_bytes=resident))
        words = refused.value.hint.split()
        assert words[1] == flag
        plan(replace(on(parse_bytes(words[2])), resident_bytes=resident + LARGER_BYTES))


@pytest.mark.parametrize("segments", ["expandable", "native"])
def test_the_flags_that_are_named_are_enough_together(segments):
    """For pairs of small host and GPU budgets, the error names one flag if one is enough, else both."""
    named_both = False
    for host in range(400, 2600, 300):
        for card in range(200, 1400, 150):
            on = replace(machine("cuda", host << 20, card << 20), segments=segments)
            try:
                plan(on)
            except OutOfMemoryBudget as refused:
                flags = budgets_in(refused)
                named_both |= len(flags) == 2
                plan(replace(on, **flags))
    assert named_both


def budgets_in(refused: OutOfMemoryBudget) -> dict[str, int]:
    """Return the values of --ram and --vram in the hint, as fields of a Machine."""
    words, fields = refused.hint.split(), {"--ram": "host_bytes", "--vram": "device_bytes"}
    return {fields[word]: parse_bytes(value) for word, value in zip(words, words[1:], strict=False) if word in fields}


def test_with_less_gpu_memory_maps_move_to_the_host():
    def choose_place(gib):
        return plan(machine("cuda", 64 * GIB, int(gib * GIB))).find_stage("denoise", 1).strategy.place

    assert [choose_place(gib) for gib in (16, 0.45, 0.38)] == ["device", "skips", "host"]


def test_halves_of_guidance_share_a_batch_below_4096_px_only():
    def are_batched(size, **request):
        found = plan(machine("cuda", 64 * GIB, 16 * GIB), size=size, **request)
        return [stage.strategy.batched for stage in found.stages if stage.kind == "denoise"]

    assert are_batched(Size(2048, 2048)) == [True, True]
    assert are_batched(Size(4096, 4096)) == [True, False]
    assert are_batched(Size(2048, 2048), guidance_scale=(1.0,)) == [False, False]


def test_maps_move_only_to_a_host_with_enough_memory():
    plan(machine("cuda", GIB, GIB // 3))
    with pytest.raises(OutOfMemoryBudget) as refused:
        plan(machine("cuda", 800 << 20, GIB // 3))
    assert "--vram" in refused.value.hint
    with pytest.raises(OutOfMemoryBudget) as refused:
        plan(machine("cuda", GIB // 2, GIB // 3))
    assert "--ram" in refused.value.hint


def test_an_unsupported_unet_runs_without_strips_or_is_refused(tmp_path, xl_model):
    import json
    import shutil

    model = Path(shutil.copytree(xl_model, tmp_path / "model"))
    config = json.loads((model / "unet" / "config.json").read_text())
    config["down_block_types"][1] = "AttnDownBlock2D"
    (model / "unet" / "config.json").write_text(json.dumps(config))
    (model / "linfusion" / "config.json").write_text(json.dumps({"modules_list": []}))
    request = build_request(Size(256, 256), output=tmp_path / "a.tif", model=str(model), attention=("original",))
    assert plan_run(resolve_request(request)).find_stage("denoise", 1).estimate is None

    request = build_request(Size(256, 256), output=tmp_path / "a.tif", model=str(model), strength=(0.5,))
    with pytest.raises(DataError, match="LinFusion weights|down_blocks.1"):
        plan_run(resolve_request(request))


def choose_vae_strategy(budget_gib: float, kind: str = "decode", on: str = "cpu", **request):
    """Return the strategy for decoding the final image, or for encoding at the start of the last phase."""
    budget = int(budget_gib * GIB)
    where = machine("cpu", budget) if on == "cpu" else machine("cuda", 64 * GIB, budget)
    return plan(where, **request).find_stage(kind, 1).strategy


def test_statistics_are_exact_if_complete_maps_need_a_small_share_of_the_memory():
    assert choose_vae_strategy(128).statistics == "exact" and choose_vae_strategy(24).statistics == "partly exact"
    strategies = [choose_vae_strategy(2, kind) for kind in ("decode", "start")]
    assert [(strategy.statistics, strategy.patches) for strategy in strategies] == [("sampled", 128), ("sampled", 64)]
    assert [choose_vae_strategy(2, on=on).height for on in ("cpu", "cuda")] == [8, 16]


def test_less_memory_means_fewer_patches_and_lower_strips():
    with pytest.raises(OutOfMemoryBudget) as refused:
        choose_vae_strategy(0.01, on="cuda")
    named = parse_bytes(refused.value.hint.split()[2]) / GIB
    strategy = choose_vae_strategy(named, "start", on="cuda")
    assert strategy.statistics == "sampled" and strategy.patches < 64


def test_requested_statistics_are_used_or_refused():
    assert choose_vae_strategy(128, vae_statistics="sampled").statistics == "sampled"
    assert choose_vae_strategy(24, vae_statistics="exact").statistics == "exact"
    with pytest.raises(OutOfMemoryBudget) as refused:
        choose_vae_strategy(4, vae_statistics="exact")
    assert "--vae-statistics auto" in refused.value.hint


def test_an_image_is_buffered_in_memory_between_decoding_and_encoding_if_it_fits():
    found = plan(machine("cpu", 64 * GIB))
    both = (found.find_stage("decode", 0), found.find_stage("start", 1))
    assert {stage.image_buffer_bytes for stage in both} == {SIZES[0].area * 6}
