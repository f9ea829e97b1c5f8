"""Which way to run is chosen for a budget, and what is said when there is none."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from linfusion_cli.core.errors import DataError, OutOfMemoryBudget
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.units import parse_bytes
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.parts import Model
from linfusion_cli.models.locate.model import DEMO_FOLDER
from linfusion_cli.planning.machine import Machine
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.planning.plan import MARGIN_BYTES, STRIP_SIZES, Plan, PlanInputs, make_plan
from linfusion_cli.planning.speed import Speed
from linfusion_cli.run.inputs.resolve import resolve_request
from linfusion_cli.run.stages.plan import plan_run
from linfusion_cli.sampling.phases import PhaseSizes, build_phases
from linfusion_cli.sampling.upscalers.pass_count import count_passes
from linfusion_cli.settings.request import GenerateRequest

GIB = 1 << 30
SIZES = [Size(256, 256), Size(8192, 8192)]


def machine(kind: str, host_bytes: int, device_bytes: int | None = None) -> Machine:
    speed = Speed(1e12, 1e10)
    dtype = torch.float32 if kind == "cpu" else torch.float16
    return Machine(torch.device(kind), dtype, torch.float32, host_bytes, device_bytes, GIB // 2, speed, speed)


def a_request(size: Size, **changed) -> GenerateRequest:
    values = {"prompt": "a hill", "size": size, "output": Path("a.tif"), "model": "demo"}
    return GenerateRequest(**values | changed)


@cache
def demo_outline() -> MetaModel:
    """Read once for all plans, which leave it as it was."""
    return MetaModel.read(Model(DEMO_FOLDER), DEMO_FOLDER / "linfusion")


def plan(on: Machine, attentions=("original", "linear"), outline: MetaModel | None = None, **request) -> Plan:
    """A plan for the demo model, from 256² to 8192²."""
    sizes = [SIZES[0], request.pop("size", SIZES[-1])]
    wanted = a_request(sizes[-1], attention=attentions, steps=(4,), strength=(0.5,), **request)
    phases = build_phases(wanted, PhaseSizes(sizes, SIZES[0], SIZES[0], SIZES[0], from_noise=True))
    facts = read_facts(Model(DEMO_FOLDER))
    passes = [count_passes(wanted, facts.scheduler_config, phase) for phase in phases]
    return make_plan(PlanInputs(wanted, facts, phases, passes), outline or demo_outline(), on)


def test_a_cpu_with_room_takes_the_best_strips_for_linear_attention_alone():
    found = plan(machine("cpu", 64 * GIB))
    assert [(stage.kind, stage.phase) for stage in found.stages] == [
        ("denoise", 0),
        ("decode", 0),
        ("encode", 1),
        ("denoise", 1),
        ("decode", 1),
    ]
    assert found.stage("denoise", 0).mode.strips is None
    assert found.stage("denoise", 1).mode.strips == STRIP_SIZES["cpu"][0]
    assert found.need.seconds == pytest.approx(sum(stage.need.seconds for stage in found.stages))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_is_named_as_the_smallest_budget_does_and_less_does_not(kind):
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
        plan(on(named - margin - GIB // 10))  # it is named with one decimal, rounded up


LARGER_BYTES = 50 << 20  # by which a process may be larger than the one that named a budget


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
    """From several sizes of the first process, as rounding the budget up may hide a margin that is missing."""
    for resident in range(300 << 20, 400 << 20, 25 << 20):
        with pytest.raises(OutOfMemoryBudget) as refused:
            plan(replace(on(GIB // 8), resident_bytes=resident))
        words = refused.value.hint.split()
        assert words[1] == flag
        plan(replace(on(parse_bytes(words[2])), resident_bytes=resident + LARGER_BYTES))


@pytest.mark.parametrize("segments", ["expandable", "native"])
def test_the_flags_that_are_named_are_enough_together(segments):
    """From every pair of a small host and a small card: one flag where one is enough, both where both are too small."""
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
    """What --ram and --vram are to be, as fields of a Machine."""
    words, fields = refused.hint.split(), {"--ram": "host_bytes", "--vram": "device_bytes"}
    return {fields[word]: parse_bytes(value) for word, value in zip(words, words[1:], strict=False) if word in fields}


def test_with_less_room_on_the_card_maps_move_to_the_host():
    def mode(gib):
        return plan(machine("cuda", 64 * GIB, int(gib * GIB))).stage("denoise", 1).mode

    assert [mode(gib).place for gib in (16, 0.45, 0.38)] == ["device", "skips", "host"]


def test_halves_of_guidance_share_a_batch_below_4096_px_only():
    def together(size, **request):
        found = plan(machine("cuda", 64 * GIB, 16 * GIB), size=size, **request)
        return [stage.mode.together for stage in found.stages if stage.kind == "denoise"]

    assert together(Size(2048, 2048)) == [True, True]
    assert together(Size(4096, 4096)) == [True, False]
    assert together(Size(2048, 2048), guidance_scale=(1.0,)) == [False, False]


def test_maps_move_only_to_a_host_that_has_room():
    plan(machine("cuda", GIB, GIB // 3))
    with pytest.raises(OutOfMemoryBudget) as refused:
        plan(machine("cuda", 800 << 20, GIB // 3))
    assert "--vram" in refused.value.hint
    with pytest.raises(OutOfMemoryBudget) as refused:
        plan(machine("cuda", GIB // 2, GIB // 3))
    assert "--ram" in refused.value.hint


def test_a_unet_of_an_unknown_kind_runs_whole_or_is_refused_by_name(tmp_path, xl_model):
    import json
    import shutil

    model = Path(shutil.copytree(xl_model, tmp_path / "model"))
    config = json.loads((model / "unet" / "config.json").read_text())
    config["down_block_types"][1] = "AttnDownBlock2D"
    (model / "unet" / "config.json").write_text(json.dumps(config))
    (model / "linfusion" / "config.json").write_text(json.dumps({"modules_list": []}))
    request = a_request(Size(256, 256), output=tmp_path / "a.tif", model=str(model), attention=("original",))
    assert plan_run(resolve_request(request)).stage("denoise", 1).need is None

    request = a_request(Size(256, 256), output=tmp_path / "a.tif", model=str(model), strength=(0.5,))
    with pytest.raises(DataError, match="LinFusion weights|down_blocks.1"):
        plan_run(resolve_request(request))


def method(budget_gib: float, kind: str = "decode", on: str = "cpu", **request):
    """How the last picture is decoded, or what the last phase begins with encoded, on a machine with this memory."""
    budget = int(budget_gib * GIB)
    where = machine("cpu", budget) if on == "cpu" else machine("cuda", 64 * GIB, budget)
    return plan(where, **request).stage(kind, 1).mode


def test_statistics_are_exact_where_whole_maps_take_a_small_part_of_the_memory():
    assert method(128).statistics == "exact" and method(24).statistics == "partly exact"
    assert [(method(2, kind).statistics, method(2, kind).patches) for kind in ("decode", "encode")] == [
        ("sampled", 128),
        ("sampled", 64),
    ]
    assert [method(2, on=on).height for on in ("cpu", "cuda")] == [8, 16]


def test_less_memory_means_fewer_patches_and_lower_strips():
    with pytest.raises(OutOfMemoryBudget) as refused:
        method(0.01, on="cuda")
    named = parse_bytes(refused.value.hint.split()[2]) / GIB
    least = method(named, "encode", on="cuda")
    assert least.statistics == "sampled" and least.patches < 64


def test_statistics_that_were_asked_for_are_kept_or_refused():
    assert method(128, vae_statistics="sampled").statistics == "sampled"
    assert method(24, vae_statistics="exact").statistics == "exact"
    with pytest.raises(OutOfMemoryBudget) as refused:
        method(4, vae_statistics="exact")
    assert "--vae-statistics auto" in refused.value.hint


def test_a_image_waits_in_memory_between_decoding_and_encoding_if_there_is_room():
    found = plan(machine("cpu", 64 * GIB))
    both = (found.stage("decode", 0), found.stage("encode", 1))
    assert {stage.waiting_bytes for stage in both} == {SIZES[0].area * 6}
