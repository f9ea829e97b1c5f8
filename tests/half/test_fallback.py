"""NaN or Inf in half precision: the step is repeated in a wider dtype, with weights read again, and the run goes on."""

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linfusion_cli.checkpoint.store import CheckpointStore
from linfusion_cli.core.errors import NonFinite, Stopped
from linfusion_cli.core.events import Notice, StageAdvanced, StageFinished
from linfusion_cli.hardware import device
from linfusion_cli.images import read_info
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.models.text import encode as text_encode
from linfusion_cli.run.checkpoint.latents_file import open_latents
from linfusion_cli.run.stages import load as stages_load
from linfusion_cli.run.stages import plan, precision
from tests.half.runs import BASE, DOUBLE, HALF, files, history, notices
from tests.support.marks import mostly_slow
from tests.support.small_models import small_vae

FAILS = {"dpmpp-2m": (BASE, 2), "euler-a": (BASE, 1), "unipc": (DOUBLE, 1), "euler": (DOUBLE, 0)}


def stop_before(bad: tuple[int, int]):
    """An observer that stops a run when it has taken all steps before this one."""
    steps = bad[1] + (4 if bad[0] == DOUBLE else 0)
    taken = []

    def observer(event):
        if isinstance(event, StageFinished) and steps == 4 and len(taken) == 4:
            raise Stopped(15)  # the base is over, and saved
        if isinstance(event, StageAdvanced) and event.done and observer.unit == "steps":
            taken.append(event.done)
            if len(taken) == steps and steps != 4:
                raise Stopped(15)
        observer.unit = getattr(event, "unit", observer.unit)

    observer.unit = ""
    return observer


def accept_another_dtype() -> None:
    """Mark what a run has saved as after NaN: the reference goes on in another dtype without any fallback."""
    with CheckpointStore(Path("a.png")).held() as store:
        found = store.read()
        store.save({**found.head, "non_finite": "by hand"}, found.parts)


@pytest.mark.parametrize("scheduler", mostly_slow(FAILS, quick=("dpmpp-2m", "euler-a")))
def test_it_equals_a_run_whose_later_steps_are_in_bfloat16(make, clear, forwards, scheduler):
    place = FAILS[scheduler]
    with pytest.raises(Stopped):
        make(stop_before(place), scheduler=scheduler)
    assert set(forwards.dtypes) == {"float16"}
    accept_another_dtype()
    expected = make(scheduler=scheduler, dtype="bfloat16").latents
    clear()
    forwards.dtypes.clear()
    forwards.bad, forwards.value = {place: {"float16"}}, -math.inf if scheduler == "unipc" else math.nan
    made = make(scheduler=scheduler)
    before = place[1] + (4 if place[0] == DOUBLE else 0)
    assert forwards.dtypes == ["float16"] * (before + 1) + ["bfloat16"] * (7 - before)
    assert torch.equal(made.latents, expected)


def test_files_report_and_notice_tell_it(make, forwards):
    forwards.bad = {(BASE, 2): {"float16"}}
    made = make(save_phases=True, preview=Path("small.jpg"))
    expected = history((0, 0, "float16"), (0, 2, "bfloat16"))
    assert made.report.dtypes == expected
    told = [read_info(Path(name)).request["dtypes"] for name in ("a.png", "a-64x64.png", "small.jpg")]
    assert told == [expected] * 3 and open_latents(Path("a.safetensors")).made_with["dtypes"] == expected
    fails = "The model predicts NaN or Inf at step 3 of 4 in phase base (float16)."
    assert notices(made) == [f"{fails} This is repeated, and the run goes on, in bfloat16."]
    phases = [(stage.name, stage.steps) for stage in made.report.stages if stage.kind == "denoise"]
    assert phases == [("base", 2), ("base", 2), ("2x", 3)]
    assert [event.cut_short for event in made.listener.of(StageFinished)].count(True) == 1


@pytest.mark.slow
@pytest.mark.parametrize("format", ["tiff", "jpeg"])
def test_files_of_other_formats_tell_it_too(make, forwards, format):
    forwards.bad = {(BASE, 0): {"float16"}}
    make(output=Path(f"a.{format}"))
    from linfusion_cli.images.verify.verify import verify_image

    assert verify_image(Path(f"a.{format}")).request["dtypes"] == history((0, 0, "bfloat16"))


@pytest.mark.parametrize(
    ("dtype", "bad", "expected"),
    [
        ("float16", HALF, ["float16", "float32"]),
        ("bfloat16", {"bfloat16"}, ["bfloat16", "float32"]),
    ],
)
def test_float32_is_the_last_resort(make, forwards, dtype, bad, expected):
    forwards.bad = {(DOUBLE, 1): bad}
    made = make(dtype=dtype)
    assert made.report.dtypes == history((0, 0, expected[0]), (1, 1, expected[1]))
    assert forwards.dtypes[-2:] == ["float32"] * 2 and len(notices(made)) == len(bad)


@pytest.mark.slow
def test_two_steps_may_fail_one_after_the_other(make, forwards):
    forwards.bad = {(BASE, 1): {"float16"}, (DOUBLE, 2): HALF}
    made = make()
    assert made.report.dtypes == history((0, 0, "float16"), (0, 1, "bfloat16"), (1, 2, "float32"))


@pytest.mark.slow
def test_a_device_without_bfloat16_goes_on_in_float32(make, forwards, monkeypatch):
    monkeypatch.setattr(plan, "is_cuda", lambda device: True)
    monkeypatch.setattr(plan, "has_bfloat16", lambda device: False)
    forwards.bad = {(BASE, 1): {"float16"}}
    assert make().report.dtypes == history((0, 0, "float16"), (0, 1, "float32"))


def test_where_float32_fails_too_it_ends_and_begins_there_again_in_what_was_used(make, clear, forwards):
    expected = make().latents
    clear()
    forwards.bad = {(DOUBLE, 1): {*HALF, "float32"}}
    for _ in range(2):
        with pytest.raises(NonFinite, match=r"step 2 of 3 in phase 2x \(float32\). Check .*Saved: step 1 of 3") as end:
            make()
        assert end.value.exit_code == 65 and forwards.dtypes[-3:] == ["float16", "bfloat16", "float32"]
    forwards.bad = {}
    made = make()  # as after the weights were repaired
    assert made.report.resumed_from == "step 1 of 3 in phase 2x" and made.report.dtypes == history((0, 0, "float16"))
    assert torch.equal(made.latents, expected) and not notices(made)


@pytest.mark.parametrize("moment", mostly_slow((0, 1, 3, 5, 8), quick=(3,)))
def test_a_run_that_is_stopped_later_goes_on_to_the_same_files(make, clear, tmp_path, forwards, moment):
    """In the dtype that it had: after a stop in the base, between the phases, while it decodes …"""
    changed = {"save_phases": True, "preview": Path("small.jpg"), "scheduler": "dpmpp-2m"}
    forwards.bad = {(BASE, 2): {"float16"}}
    make(**changed)
    expected = files(tmp_path)
    clear()
    left = [moment + 2]  # steps and bands of rows

    def observer(event):
        left[0] -= isinstance(event, StageAdvanced)
        if left[0] < 0:
            raise Stopped(15)

    with pytest.raises(Stopped):
        make(observer, **changed)
    forwards.dtypes.clear()
    made = make(**changed)
    assert files(tmp_path) == expected and "float16" not in forwards.dtypes and not notices(made)


@pytest.mark.slow
def test_a_run_that_was_killed_before_the_step_that_fails_goes_on_to_the_same_file(make, clear, tmp_path, forwards):
    forwards.bad = {(DOUBLE, 1): {"float16"}}
    make(checkpoint_every=0.0)
    expected = files(tmp_path)
    clear()
    with pytest.raises(Stopped):
        make(stop_before((BASE, 3)), checkpoint_every=0.0)
    assert make(checkpoint_every=0.0).report.resumed_from == "step 3 of 4 in phase base"
    assert files(tmp_path) == expected


@pytest.mark.slow
def test_without_room_for_it_the_last_good_state_waits_for_more(make, clear, forwards, monkeypatch):
    """Memory that others took meanwhile: 71, and the same command goes on as soon as there is some."""
    forwards.bad = {(DOUBLE, 1): HALF}
    expected = make().latents
    clear()
    planned = precision.plan_run

    def short(resolved, executed, kept_bytes, model_cache, least):
        scarce = replace(resolved, request=replace(resolved.request, ram=1)) if least == "float32" else resolved
        return planned(scarce, executed, kept_bytes, model_cache, least)

    with monkeypatch.context() as scarcely, pytest.raises(NonFinite) as end:
        scarcely.setattr(precision, "plan_run", short)
        make()
    assert end.value.exit_code == 71
    said = str(end.value)
    assert "step 2 of 3 in phase 2x (bfloat16). There is no room to repeat this in float32: 128x128 needs" in said
    assert "Use --ram" in said and "Saved: step 1 of 3 in phase 2x; the same command goes on from there" in said
    made = make()
    assert made.report.resumed_from == "step 1 of 3 in phase 2x" and torch.equal(made.latents, expected)
    assert made.report.dtypes == history((0, 0, "float16"), (1, 1, "float32"))


def test_prompts_are_encoded_anew_and_what_was_said_of_them_is_not_said_twice(make, forwards, monkeypatch):
    heard, encode = [], text_encode._encode
    monkeypatch.setattr(text_encode, "_encode", lambda *args: heard.append(args[0].network.dtype) or encode(*args))
    forwards.bad = {(BASE, 2): {"float16"}}
    made = make(prompt="a hill " * 60)
    assert heard == [torch.float16] * 2 + [torch.bfloat16] * 2
    assert sum("too long" in notice for notice in notices(made)) == 1 and len(notices(made)) == 2


@pytest.mark.slow
def test_the_next_job_of_a_batch_begins_in_its_own_dtype(make, clear, forwards):
    alone = make(seed=2).latents
    clear()
    model_cache = ModelCache()
    forwards.bad = {(BASE, 1): HALF}
    assert make(model_cache=model_cache).report.dtypes == history((0, 0, "float16"), (0, 1, "float32"))
    clear()
    forwards.bad = {}
    forwards.dtypes.clear()
    second = make(model_cache=model_cache, seed=2)
    assert set(forwards.dtypes) == {"float16"} and second.report.dtypes == history((0, 0, "float16"))
    assert torch.equal(second.latents, alone)


@pytest.mark.parametrize("keeps", mostly_slow((False, True), quick=(False,)))
def test_the_narrow_models_are_gone_before_the_wide_ones_are_read(make, forwards, monkeypatch, keeps):
    read, alive, load = [], [], stages_load.load_unet

    def watched(model, dtype):
        gc.collect()
        alive.append(sum(unet() is not None for unet in read))
        unet = load(model, dtype)
        read.append(weakref.ref(unet))
        return unet

    monkeypatch.setattr(stages_load, "load_unet", watched)
    forwards.bad = {(BASE, 1): HALF}
    make(model_cache=ModelCache(keeps))
    assert alive == [0, 0, 0]


@pytest.mark.slow
def test_the_checkpoint_knows_of_it_before_the_step_is_repeated(make, forwards):
    """A run that is killed while the weights are read again goes on in the wider dtype."""
    found = []

    def observer(event):
        if isinstance(event, Notice):
            found.append(CheckpointStore(Path("a.png")).read())

    forwards.bad = {(DOUBLE, 1): {"float16"}}
    make(observer)
    assert found[0].head["dtypes"] == history((0, 0, "float16"), (1, 1, "bfloat16"))
    assert found[0].parts["reached"]["steps"] == 1 and "non_finite" not in found[0].head


@pytest.mark.slow
def test_the_new_plan_is_for_the_new_dtype_and_the_report_has_it(make, forwards, monkeypatch):
    """It is planned as at the beginning: of what is loaded by then, the VAE is reckoned with once."""
    kept, plan_run = [], precision.plan_run
    monkeypatch.setattr(precision, "plan_run", lambda *args: kept.append(args[2]) or plan_run(*args))
    forwards.bad = {(BASE, 1): {"bfloat16"}}
    made = make(dtype="bfloat16")
    assert kept == [sum(2 * weights.numel() for weights in small_vae().parameters())]
    wide, stages = made.report.plan, [stage for stage in made.report.stages if stage.kind == "denoise"]
    planned = {stage["phase"]: stage["need"]["host_bytes"] for stage in wide["stages"] if stage["kind"] == "denoise"}
    assert [stage.planned_host_bytes for stage in stages[1:]] == [planned[0], planned[1]]
    assert stages[0].planned_host_bytes != planned[0]


@pytest.mark.slow
def test_upscaling_begins_with_a_image_and_falls_back_all_the_same(xl_model, tmp_path, monkeypatch, forwards):
    from PIL import Image

    from linfusion_cli.core.geometry import Size
    from linfusion_cli.run.pipeline import upscale
    from linfusion_cli.settings.request import UpscaleRequest

    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 90).convert("RGB").save("in.png")
    values = {
        "image": Path("in.png"),
        "size": Size(128, 128),
        "model": str(xl_model),
        "steps": (4,),
        "dtype": "float16",
    }
    request = UpscaleRequest(**values, strength=(0.9,), output=Path("a.png"), upscaler="demofusion", device="cpu")
    forwards.bad = {(DOUBLE, 2): {"float16"}}
    report = upscale(request, {})
    assert report.dtypes == history((0, 0, "float16"), (0, 2, "bfloat16"))
    assert read_info(Path("a.png")).request["dtypes"] == report.dtypes


def test_the_command_line_warns_once_and_ends_well(cli, xl_model, forwards):
    forwards.bad = {(BASE, 1): {"float16"}}
    arguments = ["--model", xl_model, "--size", "64", "--steps", "2", "--dtype", "float16", "--device", "cpu"]
    code, out, err = cli("generate", "a hill", *arguments, "-o", "b.png")
    assert (code, out.strip()) == (0, "b.png")
    assert err.count("goes on, in bfloat16") == 1 and "Traceback" not in err


def test_the_switch_is_for_those_who_know_it(cli, monkeypatch):
    assert "CPU_HALF" not in cli("generate", "--help")[1]
    cpu = torch.device("cpu")
    assert device.pick_dtype("auto", cpu) == device.pick_vae_dtype("auto", cpu) == torch.float32
    assert (
        device.pick_dtype("float16", cpu) == torch.float16 and device.pick_vae_dtype("float16", cpu) == torch.bfloat16
    )
    monkeypatch.delenv("LINFUSION_CPU_HALF")
    code, _, err = cli("generate", "a", "--model", "demo", "--size", "64", "--dtype", "float16", "-o", "b.png")
    assert code == 2 and "a CPU runs in float32" in err
