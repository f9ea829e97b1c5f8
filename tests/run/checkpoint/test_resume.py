"""A run that is stopped at any point resumes and writes the same files, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from linfusion_cli.checkpoint.store import LOCK_FILE, CheckpointStore
from linfusion_cli.core.errors import CannotCreateOutput, Stopped, TemporaryFailure, UsageError, WriteFailed
from linfusion_cli.core.events import Notice, StageAdvanced, StageStarted
from linfusion_cli.core.geometry import Size
from linfusion_cli.images import read_info
from linfusion_cli.planning import plan
from linfusion_cli.run.checkpoint import manager
from linfusion_cli.run.pipeline import generate
from linfusion_cli.run.stages import load
from linfusion_cli.settings.request import SCHEDULERS
from linfusion_cli.strips.ops import StripSize
from tests.support.fakes import Listener
from tests.support.marks import mostly_slow
from tests.support.other_process import lock_in_other_process
from tests.support.requests import make_request

VARIANTS = {
    "demofusion": {"upscaler": "demofusion", "guidance_scale": (2.0,)},
    "drawn": {"scheduler": "euler-a", "vae_latents": "sample"},
    "latent": {"upscale_space": "latent", "scheduler": "dpmpp-2m"},
    "kept": {"save_phases": True, "preview": Path("small.jpg"), "keep_latents": Path("a.safetensors")},
    "reduced": {"size": Size(60, 50)},
    "whole": {"linfusion": "none", "scheduler": "unipc"},
    "still": {"strength": (0.0,)},
}


@pytest.fixture
def make(xl_model, tmp_path, monkeypatch):
    """Return a function that calls generate() with small settings in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(observer=None, **changed):
        values = {"prompt": "a hill", "size": Size(128, 128), "model": str(xl_model), "steps": (4,), "strength": (0.7,)}
        values |= {"output": Path("a.png"), "checkpoint_every": 0.0, "upscaler": "sdedit"} | changed
        return generate(make_request(**values), {}, observer or Listener())

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def after(count: int):
    """Return an observer that stops the run after `count` steps and bands of rows."""
    left = [count]

    def observer(event):
        if isinstance(event, StageAdvanced):
            left[0] -= 1
            if left[0] < 0:
                raise Stopped(15)

    return observer


def moments(make, tmp_path, changed) -> tuple[dict[str, bytes], int]:
    """Return the files of an uninterrupted run, and its number of events that `after` counts."""
    listener = Listener()
    make(listener, **changed)
    made = files(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    return made, len(listener.of(StageAdvanced))


@pytest.mark.parametrize("name", mostly_slow(VARIANTS, quick=("drawn", "kept")))
def test_stopped_anywhere_it_goes_on_to_the_same_files(make, tmp_path, name):
    expected, count = moments(make, tmp_path, VARIANTS[name])
    resumed = set()
    for moment in range(0, count, max(1, count // 6)):
        with pytest.raises(Stopped):
            make(after(moment), **VARIANTS[name])
        resumed.add(make(**VARIANTS[name]).resumed_from)
        assert files(tmp_path) == expected and not (tmp_path / "a.png.linfusion").exists()
        for path in tmp_path.iterdir():
            path.unlink()
    assert len(resumed) >= 3 and "the finished latents" in resumed


@pytest.mark.parametrize(
    "scheduler", mostly_slow([name for name in SCHEDULERS if name != "pndm"], quick=("euler-a", "dpmpp-2m"))
)
def test_every_scheduler_goes_on(make, tmp_path, scheduler):
    changed = {"scheduler": scheduler, "steps": (6,)}
    expected, _ = moments(make, tmp_path, changed)
    with pytest.raises(Stopped):
        make(after(2), **changed)  # in the base
    with pytest.raises(Stopped):
        make(in_second_phase, **changed)
    assert "in phase 2x" in make(**changed).resumed_from
    assert files(tmp_path) == expected


def in_second_phase(event):
    """Stop the run after the second step of phase 2x."""
    if isinstance(event, StageStarted):
        in_second_phase.stage = (event.kind, event.phase_name)
    elif isinstance(event, StageAdvanced) and in_second_phase.stage == ("denoise", "2x") and event.done == 2:
        raise Stopped(15)


def test_pndm_goes_on_in_its_one_phase(make, tmp_path):
    changed = {"scheduler": "pndm", "steps": (6,), "size": Size(64, 64)}
    expected, _ = moments(make, tmp_path, changed)
    with pytest.raises(Stopped):
        make(after(5), **changed)
    assert make(**changed).resumed_from == "step 6 of 7 in phase base"
    assert files(tmp_path) == expected


def test_upscale_goes_on(xl_model, tmp_path, monkeypatch, make):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 90).convert("RGB").save("in.png")
    values = {"image": Path("in.png"), "size": Size(192, 128), "model": str(xl_model), "steps": (6,)}
    request = make_request(**values, strength=(0.9,), output=Path("a.png"), upscaler="demofusion", checkpoint_every=0)
    generate(request, {})
    expected = files(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(Stopped):
        generate(request, {}, in_second_phase)
    assert "in phase 2x" in generate(request, {}).resumed_from and files(tmp_path) == expected
    (tmp_path / "a.png").unlink()
    with pytest.raises(Stopped):
        generate(request, {}, in_second_phase)
    Image.new("RGB", (96, 64)).save("in.png")  # another image under the same name
    with pytest.raises(UsageError, match=r"image/in\.png with other content"):
        generate(request, {})


def test_finished_latents_are_not_computed_again(make, tmp_path, phases):
    with pytest.raises(Stopped):
        make(stopping_at("write"))
    done = len(phases)
    report = make()
    assert report.resumed_from == "the finished latents" and len(phases) == done
    kinds = [stage.kind for stage in report.stages]
    assert kinds == ["resolve", "plan", "resolve", "load", "decode", "write"]  # no text encoder, no UNet


def stopping_at(kind: str):
    def observer(event):
        if isinstance(event, StageStarted) and event.kind == kind:
            raise Stopped(15)

    return observer


def test_the_report_has_the_resumed_state_and_counts_own_steps_only(make):
    with pytest.raises(Stopped) as stopped:
        make(in_second_phase)
    assert str(stopped.value) == ("Stopped by SIGTERM. Saved: step 2 of 3 in phase 2x; the same command resumes it.")
    report = make()
    (stage,) = [stage for stage in report.stages if stage.kind == "denoise"]
    assert (stage.phase_name, stage.steps, report.resumed_from) == ("2x", 1, "step 2 of 3 in phase 2x")


def test_saves_are_counted_and_their_interval_is_configurable(make):
    often, seldom = make(), make(output=Path("b.png"), checkpoint_every=3600.0)
    assert seldom.checkpoints["count"] == 3  # the ends of both phases, and the start of the second
    assert often.checkpoints["count"] > seldom.checkpoints["count"]
    assert often.checkpoints["bytes"] > 0 and 0 < often.checkpoints["seconds"] < often.total_seconds


def test_fresh_starts_over(make, tmp_path):
    with pytest.raises(Stopped):
        make(in_second_phase)
    assert make(fresh=True).resumed_from is None
    assert set(files(tmp_path)) == {"a.png"}


def test_a_changed_request_is_refused_by_the_names_of_what_changed(make, tmp_path):
    with pytest.raises(Stopped):
        make(in_second_phase)
    before = (tmp_path / "a.png.linfusion" / "checkpoint.json").read_bytes()
    with pytest.raises(UsageError, match=r"now --seed 3 instead of 0; --steps 5 instead of 4\..*--fresh"):
        make(seed=3, steps=(5,))
    assert (tmp_path / "a.png.linfusion" / "checkpoint.json").read_bytes() == before
    report = make(ram=8 << 30, dpi=72.0, preview=Path("small.jpg"))  # settings that do not change the latents
    assert report.resumed_from and read_info(tmp_path / "a.png").dpi == pytest.approx(72, abs=0.1)


def test_changed_weights_are_refused(make, xl_model, tmp_path):
    folder = shutil.copytree(xl_model, tmp_path / "model")
    with pytest.raises(Stopped):
        make(in_second_phase, model="model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UsageError, match=r"unet/diffusion_pytorch_model\.safetensors with other content"):
        make(model="model")


def test_the_plan_that_was_executed_is_executed_again(make, monkeypatch, tmp_path):
    with pytest.raises(Stopped):
        make(in_second_phase)
    made = CheckpointStore(tmp_path / "a.png").read().metadata
    monkeypatch.setitem(plan.STRIP_SIZES, "cpu", (StripSize(2, 128),))
    threads = torch.get_num_threads()
    monkeypatch.setattr(load, "DEFAULT_THREADS", threads + 1)
    listener = Listener()
    report = make(listener)
    rows = [
        stage["strategy"]["strips"]["rows"]
        for stage in report.plan["stages"]
        if (stage["kind"], stage["phase_name"]) == ("denoise", "2x")
    ]
    assert rows == [16] and made["threads"] == threads == torch.get_num_threads()
    assert not any("rounding" in notice.text for notice in listener.of(Notice))


def test_a_plan_that_no_longer_fits_is_changed_with_a_notice(make, monkeypatch):
    with pytest.raises(Stopped):
        make(in_second_phase)
    monkeypatch.setitem(plan.STRIP_SIZES, "cpu", (StripSize(2, 128),))
    fits, seen = plan.is_within_budget, []
    monkeypatch.setattr(
        plan, "is_within_budget", lambda *given: fits(*given) and len(seen.append(given) or seen) % 2 == 0
    )
    listener = Listener()
    make(listener)
    assert any("another plan" in notice.text and "rounding" in notice.text for notice in listener.of(Notice))


def test_an_output_that_cannot_be_written_costs_only_the_decoding(make, tmp_path, monkeypatch, phases):
    with monkeypatch.context() as patch:
        patch.setattr("linfusion_cli.images.AtomicFile.commit", no_space)
        with pytest.raises(WriteFailed):
            make(checkpoint_every=3600.0)
    done = len(phases)
    assert make().resumed_from == "the finished latents" and len(phases) == done


def no_space(*_):
    raise WriteFailed("No space left.")


def test_a_state_that_cannot_be_saved_does_not_end_the_run(make, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("linfusion_cli.checkpoint.store._write_synced", fail)
    listener = Listener()
    report = make(listener)
    notices = [notice.text for notice in listener.of(Notice)]
    assert notices and all("a.png.linfusion" in text and "No space left on device" in text for text in notices)
    assert report.checkpoints["count"] == 0 and set(files(tmp_path)) == {"a.png"}


def test_another_run_of_the_same_output_is_reported(make, tmp_path):
    store = CheckpointStore(tmp_path / "a.png").folder
    store.mkdir()
    with lock_in_other_process(store / LOCK_FILE), pytest.raises(TemporaryFailure, match="Another run is writing"):
        make()
    make()


def test_killed_after_the_rename_it_is_complete(make, tmp_path, monkeypatch):
    """The output has its final name, but the checkpoint was not removed."""
    with monkeypatch.context() as patch:
        patch.setattr(manager.CheckpointManager, "finish", lambda self: None)
        make(preview=Path("small.jpg"))
    expected = files(tmp_path)
    listener = Listener()
    report = make(listener, preview=Path("small.jpg"))
    assert report.already_complete and files(tmp_path) == expected
    assert not (tmp_path / "a.png.linfusion").exists()
    json.dumps(report.to_json())
    with pytest.raises(CannotCreateOutput):
        make(preview=Path("small.jpg"))


def test_killed_before_its_preview_it_makes_both(make, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manager.CheckpointManager, "finish", lambda self: None)
        make(preview=Path("small.jpg"))
    expected = files(tmp_path)
    (tmp_path / "small.jpg").unlink()
    assert make(preview=Path("small.jpg")).resumed_from == "the finished latents"
    assert files(tmp_path) == expected


def test_a_file_of_another_request_is_never_replaced(make, tmp_path):
    with pytest.raises(Stopped):
        make(stopping_at("write"))
    (tmp_path / "a.png").write_text("precious")
    with pytest.raises(CannotCreateOutput, match="exists"):
        make()
    assert (tmp_path / "a.png").read_text() == "precious" and (tmp_path / "a.png.linfusion").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "no json"])
def test_a_damaged_checkpoint_is_quarantined(make, tmp_path, damage):
    with pytest.raises(Stopped):
        make(in_second_phase)
    folder = tmp_path / "a.png.linfusion"
    manifest, tensors = (
        folder / "checkpoint.json",
        max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size),
    )
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    elif damage == "flipped":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x55")
    elif damage == "gone":
        tensors.unlink()
    else:
        manifest.write_text("[" * 100_000)
    listener = Listener()
    assert make(listener).resumed_from is None
    (notice,) = [notice.text for notice in listener.of(Notice) if "aside-1" in notice.text]
    assert "damaged" in notice and (tmp_path / "a.png.linfusion.aside-1").is_dir() and not folder.exists()


def test_without_prompts_in_files_the_checkpoint_proves_the_request(make, tmp_path, monkeypatch):
    hidden = {"prompt_metadata": False, "preview": Path("small.png")}
    with monkeypatch.context() as patch:
        patch.setattr(manager.CheckpointManager, "finish", lambda self: None)
        make(**hidden)
    checkpoint = CheckpointStore(tmp_path / "a.png").read()
    assert make(**hidden).already_complete
    with CheckpointStore(tmp_path / "a.png").lock() as store:
        store.save(checkpoint.metadata, checkpoint.state)
    with pytest.raises(CannotCreateOutput):  # the metadata of the file have the same settings, and no prompt
        make(prompt="a sea", **hidden)


def test_a_stop_before_the_first_step_reports_the_earlier_state(make):
    with pytest.raises(Stopped):
        make(in_second_phase)
    with pytest.raises(Stopped, match="state of an earlier run.*; the same command resumes"):
        make(stopping_at("load"))
    with pytest.raises(Stopped, match="step 2 of 3 in phase 2x; the same command without --fresh resumes"):
        make(in_second_phase, fresh=True)


def test_a_failed_write_reports_the_saved_latents(make, monkeypatch):
    monkeypatch.setattr("linfusion_cli.images.AtomicFile.commit", no_space)
    with pytest.raises(WriteFailed, match=r"No space left\. Saved: the finished latents; the same command resumes"):
        make()


def test_a_phase_s_image_is_not_taken_for_the_image(make, tmp_path):
    """It has the same metadata, but another size."""
    make(save_phases=True, output=Path("b.png"))
    (tmp_path / "b-64x64.png").rename(tmp_path / "a.png")
    (tmp_path / "a.png.linfusion").mkdir()  # as if a run had been killed
    with pytest.raises(CannotCreateOutput):
        make(save_phases=True)


def test_the_same_image_by_another_path_is_the_same(xl_model, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 90).convert("RGB").save("in.png")
    values = {"size": Size(128, 128), "model": str(xl_model), "steps": (4,), "output": tmp_path / "a.png"}
    with pytest.raises(Stopped):
        generate(make_request(image=Path("in.png"), checkpoint_every=0, **values), {}, stopping_at("write"))
    report = generate(make_request(image=tmp_path / "in.png", checkpoint_every=0, **values), {})
    assert report.resumed_from == "the finished latents"


def test_changed_configs_are_refused(make, xl_model, tmp_path):
    folder = shutil.copytree(xl_model, tmp_path / "model")
    with pytest.raises(Stopped):
        make(in_second_phase, model="model")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("scaled_linear", "linear"))
    with pytest.raises(UsageError, match=r"scheduler/scheduler_config\.json with other content"):
        make(model="model")
