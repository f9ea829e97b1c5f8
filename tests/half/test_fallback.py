"""NaN or Inf in half precision: weights are loaded again in a wider dtype, and the step is repeated."""

import gc
import math
import re
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
from tests.half.runs import BASE, DOUBLE, HALF, build_history, list_notices, read_files
from tests.support.marks import mostly_slow
from tests.support.requests import change_request, make_request
from tests.support.small_models import build_small_vae

FAILS = {"dpmpp-2m": (BASE, 2), "euler-a": (BASE, 1), "unipc": (DOUBLE, 1), "euler": (DOUBLE, 0)}


def stop_before(bad: tuple[int, int]):
    """Return an observer that stops a run before this step."""
    steps = bad[1] + (4 if bad[0] == DOUBLE else 0)
    done = []

    def observer(event):
        if isinstance(event, StageFinished) and steps == 4 and len(done) == 4:
            raise Stopped(15)  # the base phase is complete and saved
        if isinstance(event, StageAdvanced) and event.done and observer.unit == "steps":
            done.append(event.done)
            if len(done) == steps and steps != 4:
                raise Stopped(15)
        observer.unit = getattr(event, "unit", observer.unit)

    observer.unit = ""
    return observer


def accept_another_dtype() -> None:
    """Mark the saved state as after NaN, so that a reference run resumes it in another dtype without fallback."""
    with CheckpointStore(Path("a.png")).lock() as store:
        checkpoint = store.read()
        store.save({**checkpoint.metadata, "non_finite": "by hand"}, checkpoint.state)


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
    result = make(scheduler=scheduler)
    before = place[1] + (4 if place[0] == DOUBLE else 0)
    assert forwards.dtypes == ["float16"] * (before + 1) + ["bfloat16"] * (7 - before)
    assert torch.equal(result.latents, expected)


def test_files_report_and_notice_have_the_dtypes(make, forwards):
    forwards.bad = {(BASE, 2): {"float16"}}
    result = make(save_phases=True, preview=Path("small.jpg"))
    expected = build_history((0, 0, "float16"), (0, 2, "bfloat16"))
    assert result.report.dtypes == expected
    dtypes = [read_info(Path(name)).request["dtypes"] for name in ("a.png", "a-64x64.png", "small.jpg")]
    assert dtypes == [expected] * 3 and open_latents(Path("a.safetensors")).metadata["dtypes"] == expected
    (notice,) = list_notices(result)
    assert re.search(r"NaN or Inf at step 3 of 4 in phase base \(float16\)\. .* in bfloat16", notice)
    phases = [(stage.phase_name, stage.steps) for stage in result.report.stages if stage.kind == "denoise"]
    assert phases == [("base", 2), ("base", 2), ("2x", 3)]
    assert [event.cut_short for event in result.listener.of(StageFinished)].count(True) == 1


@pytest.mark.slow
@pytest.mark.parametrize("format", ["tiff", "jpeg"])
def test_files_of_other_formats_have_the_dtypes_too(make, forwards, format):
    forwards.bad = {(BASE, 0): {"float16"}}
    make(output=Path(f"a.{format}"))
    from linfusion_cli.images.verify.verify import verify_image

    assert verify_image(Path(f"a.{format}")).request["dtypes"] == build_history((0, 0, "bfloat16"))


@pytest.mark.parametrize(
    ("dtype", "bad", "expected"),
    [
        ("float16", HALF, ["float16", "float32"]),
        ("bfloat16", {"bfloat16"}, ["bfloat16", "float32"]),
    ],
)
def test_float32_is_the_last_resort(make, forwards, dtype, bad, expected):
    forwards.bad = {(DOUBLE, 1): bad}
    result = make(dtype=dtype)
    assert result.report.dtypes == build_history((0, 0, expected[0]), (1, 1, expected[1]))
    assert forwards.dtypes[-2:] == ["float32"] * 2 and len(list_notices(result)) == len(bad)


@pytest.mark.slow
def test_two_steps_may_fail_one_after_the_other(make, forwards):
    forwards.bad = {(BASE, 1): {"float16"}, (DOUBLE, 2): HALF}
    result = make()
    assert result.report.dtypes == build_history((0, 0, "float16"), (0, 1, "bfloat16"), (1, 2, "float32"))


@pytest.mark.slow
def test_a_device_without_bfloat16_continues_in_float32(make, forwards, monkeypatch):
    monkeypatch.setattr(plan, "is_cuda", lambda device: True)
    monkeypatch.setattr(plan, "has_bfloat16", lambda device: False)
    forwards.bad = {(BASE, 1): {"float16"}}
    assert make().report.dtypes == build_history((0, 0, "float16"), (0, 1, "float32"))


def test_if_float32_fails_too_the_run_ends_and_is_resumed_in_its_first_dtype(make, clear, forwards):
    expected = make().latents
    clear()
    forwards.bad = {(DOUBLE, 1): {*HALF, "float32"}}
    for _ in range(2):
        with pytest.raises(NonFinite, match=r"step 2 of 3 in phase 2x \(float32\). Check .*Saved: step 1 of 3") as end:
            make()
        assert end.value.exit_code == 65 and forwards.dtypes[-3:] == ["float16", "bfloat16", "float32"]
    forwards.bad = {}
    result = make()  # as if the weights had been repaired
    assert result.report.resumed_from == "step 1 of 3 in phase 2x"
    assert result.report.dtypes == build_history((0, 0, "float16"))
    assert torch.equal(result.latents, expected) and not list_notices(result)


@pytest.mark.parametrize("moment", mostly_slow((0, 1, 3, 5, 8), quick=(3,)))
def test_a_run_that_is_stopped_after_the_fallback_resumes_to_the_same_files(make, clear, tmp_path, forwards, moment):
    """It resumes in the wider dtype: after a stop in the base phase, between phases, during decoding …"""
    changes = {"save_phases": True, "preview": Path("small.jpg"), "scheduler": "dpmpp-2m"}
    forwards.bad = {(BASE, 2): {"float16"}}
    make(**changes)
    expected = read_files(tmp_path)
    clear()
    remaining = [moment + 2]  # steps and bands of rows

    def observer(event):
        remaining[0] -= isinstance(event, StageAdvanced)
        if remaining[0] < 0:
            raise Stopped(15)

    with pytest.raises(Stopped):
        make(observer, **changes)
    forwards.dtypes.clear()
    result = make(**changes)
    assert read_files(tmp_path) == expected and "float16" not in forwards.dtypes and not list_notices(result)


@pytest.mark.slow
def test_a_run_that_was_killed_before_the_failing_step_resumes_to_the_same_file(make, clear, tmp_path, forwards):
    forwards.bad = {(DOUBLE, 1): {"float16"}}
    make(checkpoint_every=0.0)
    expected = read_files(tmp_path)
    clear()
    with pytest.raises(Stopped):
        make(stop_before((BASE, 3)), checkpoint_every=0.0)
    assert make(checkpoint_every=0.0).report.resumed_from == "step 3 of 4 in phase base"
    assert read_files(tmp_path) == expected


@pytest.mark.slow
def test_without_memory_for_the_wider_dtype_the_state_is_saved(make, clear, forwards, monkeypatch):
    """Other programs have taken the memory: exit code 71, and the same command resumes later."""
    forwards.bad = {(DOUBLE, 1): HALF}
    expected = make().latents
    clear()
    plan_run = precision.plan_run

    def plan_with_little_memory(resolved, executed, kept_bytes, model_cache, least):
        if least == "float32":
            resolved = replace(resolved, request=change_request(resolved.request, ram=1))
        return plan_run(resolved, executed, kept_bytes, model_cache, least)

    with monkeypatch.context() as patches, pytest.raises(NonFinite) as end:
        patches.setattr(precision, "plan_run", plan_with_little_memory)
        make()
    assert end.value.exit_code == 71
    message = str(end.value)
    assert re.search(r"step 2 of 3 in phase 2x \(bfloat16\).*float32.*128x128", message)
    assert "--ram" in message and "step 1 of 3 in phase 2x" in message
    result = make()
    assert result.report.resumed_from == "step 1 of 3 in phase 2x" and torch.equal(result.latents, expected)
    assert result.report.dtypes == build_history((0, 0, "float16"), (1, 1, "float32"))


def test_prompts_are_encoded_again_without_repeated_notices(make, forwards, monkeypatch):
    dtypes, encode = [], text_encode._run_encoder
    monkeypatch.setattr(
        text_encode, "_run_encoder", lambda *args: dtypes.append(args[0].network.dtype) or encode(*args)
    )
    forwards.bad = {(BASE, 2): {"float16"}}
    result = make(prompt="a hill " * 60)
    assert dtypes == [torch.float16] * 2 + [torch.bfloat16] * 2
    assert sum("77" in notice for notice in list_notices(result)) == 1 and len(list_notices(result)) == 2


@pytest.mark.slow
def test_the_next_job_of_a_batch_starts_in_its_own_dtype(make, clear, forwards):
    alone = make(seed=2).latents
    clear()
    model_cache = ModelCache()
    forwards.bad = {(BASE, 1): HALF}
    assert make(model_cache=model_cache).report.dtypes == build_history((0, 0, "float16"), (0, 1, "float32"))
    clear()
    forwards.bad = {}
    forwards.dtypes.clear()
    second = make(model_cache=model_cache, seed=2)
    assert set(forwards.dtypes) == {"float16"} and second.report.dtypes == build_history((0, 0, "float16"))
    assert torch.equal(second.latents, alone)


@pytest.mark.parametrize("keeps", mostly_slow((False, True), quick=(False,)))
def test_the_narrow_models_are_freed_before_the_wide_ones_are_loaded(make, forwards, monkeypatch, keeps):
    loaded, alive, load = [], [], stages_load.load_unet

    def load_and_count(model, dtype):
        gc.collect()
        alive.append(sum(unet() is not None for unet in loaded))
        unet = load(model, dtype)
        loaded.append(weakref.ref(unet))
        return unet

    monkeypatch.setattr(stages_load, "load_unet", load_and_count)
    forwards.bad = {(BASE, 1): HALF}
    make(model_cache=ModelCache(keeps))
    assert alive == [0, 0, 0]


@pytest.mark.slow
def test_the_checkpoint_has_the_wider_dtype_before_the_step_is_repeated(make, forwards):
    """A run that is killed while weights are loaded again resumes in the wider dtype."""
    checkpoints = []

    def observer(event):
        if isinstance(event, Notice):
            checkpoints.append(CheckpointStore(Path("a.png")).read())

    forwards.bad = {(DOUBLE, 1): {"float16"}}
    make(observer)
    assert checkpoints[0].metadata["dtypes"] == build_history((0, 0, "float16"), (1, 1, "bfloat16"))
    assert checkpoints[0].state["run_state"]["steps"] == 1 and "non_finite" not in checkpoints[0].metadata


@pytest.mark.slow
def test_the_new_plan_is_for_the_new_dtype_and_the_report_has_it(make, forwards, monkeypatch):
    """It is planned as at the start: the VAE, which is loaded already, is counted once."""
    reserved_bytes, plan_run = [], precision.plan_run
    monkeypatch.setattr(precision, "plan_run", lambda *args: reserved_bytes.append(args[2]) or plan_run(*args))
    forwards.bad = {(BASE, 1): {"bfloat16"}}
    result = make(dtype="bfloat16")
    assert reserved_bytes == [sum(2 * weights.numel() for weights in build_small_vae().parameters())]
    wide, stages = result.report.plan, [stage for stage in result.report.stages if stage.kind == "denoise"]
    planned = {
        stage["phase"]: stage["estimate"]["host_bytes"] for stage in wide["stages"] if stage["kind"] == "denoise"
    }
    assert [stage.planned_host_bytes for stage in stages[1:]] == [planned[0], planned[1]]
    assert stages[0].planned_host_bytes != planned[0]


@pytest.mark.slow
def test_upscaling_falls_back_too(xl_model, tmp_path, monkeypatch, forwards):
    from PIL import Image

    from linfusion_cli.core.geometry import Size
    from linfusion_cli.run.pipeline import generate

    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 90).convert("RGB").save("in.png")
    values = {
        "image": Path("in.png"),
        "size": Size(128, 128),
        "model": str(xl_model),
        "steps": (4,),
        "dtype": "float16",
    }
    request = make_request(**values, strength=(0.9,), output=Path("a.png"), upscaler="demofusion", device="cpu")
    forwards.bad = {(DOUBLE, 2): {"float16"}}
    report = generate(request, {})
    assert report.dtypes == build_history((0, 0, "float16"), (0, 2, "bfloat16"))
    assert read_info(Path("a.png")).request["dtypes"] == report.dtypes


def test_the_command_line_warns_once_and_completes(cli, xl_model, forwards):
    forwards.bad = {(BASE, 1): {"float16"}}
    arguments = ["--model", xl_model, "--size", "64", "--steps", "2", "--dtype", "float16", "--device", "cpu"]
    code, out, err = cli("generate", "a hill", *arguments, "-o", "b.png")
    assert (code, out.strip()) == (0, "b.png")
    assert len(re.findall(r"NaN or Inf at step .* in bfloat16", err)) == 1 and "Traceback" not in err


def test_the_developer_switch_is_not_in_the_help(cli, monkeypatch):
    assert "CPU_HALF" not in cli("generate", "--help")[1]
    cpu = torch.device("cpu")
    assert device.pick_dtype("auto", cpu) == device.pick_vae_dtype("auto", cpu) == torch.float32
    assert (
        device.pick_dtype("float16", cpu) == torch.float16 and device.pick_vae_dtype("float16", cpu) == torch.bfloat16
    )
    monkeypatch.delenv("LINFUSION_CPU_HALF")
    code, _, err = cli("generate", "a", "--model", "demo", "--size", "64", "--dtype", "float16", "-o", "b.png")
    assert code == 2 and "--dtype float16" in err
