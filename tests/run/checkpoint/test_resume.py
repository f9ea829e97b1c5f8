"""A run that is stopped anywhere goes on to the same file, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from linfusion_cli.checkpoint.store import LOCK, CheckpointStore
from linfusion_cli.core.errors import CannotCreateOutput, Stopped, TemporaryFailure, UsageError, WriteFailed
from linfusion_cli.core.events import Notice, StageAdvanced, StageStarted
from linfusion_cli.core.geometry import Size
from linfusion_cli.images import read_info
from linfusion_cli.planning import plan
from linfusion_cli.run.checkpoint import manager
from linfusion_cli.run.pipeline import generate, upscale
from linfusion_cli.run.stages import load
from linfusion_cli.settings.request import SCHEDULERS, GenerateRequest, UpscaleRequest
from linfusion_cli.strips.ops import StripSize
from tests.support.fakes import Listener
from tests.support.marks import mostly_slow
from tests.support.other_process import locked_elsewhere

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
    """generate() with small settings, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(observer=None, **changed):
        values = {"prompt": "a hill", "size": Size(128, 128), "model": str(xl_model), "steps": (4,), "strength": (0.7,)}
        values |= {"output": Path("a.png"), "checkpoint_every": 0.0, "upscaler": "sdedit"} | changed
        return generate(GenerateRequest(**values), {}, observer or Listener())

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def after(count: int):
    """An observer that stops the run after so many steps and bands of rows."""
    left = [count]

    def observer(event):
        if isinstance(event, StageAdvanced):
            left[0] -= 1
            if left[0] < 0:
                raise Stopped(15)

    return observer


def moments(make, tmp_path, changed) -> tuple[dict[str, bytes], int]:
    """The files of an undisturbed run, and how many moments it has that `after` counts."""
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
    """Stops a run after the second step above the base."""
    if isinstance(event, StageStarted):
        in_second_phase.name = event.name
    elif isinstance(event, StageAdvanced) and in_second_phase.name == "2x" and event.done == 2:
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
    request = UpscaleRequest(**values, strength=(0.9,), output=Path("a.png"), upscaler="demofusion", checkpoint_every=0)
    upscale(request, {})
    expected = files(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(Stopped):
        upscale(request, {}, in_second_phase)
    assert "in phase 2x" in upscale(request, {}).resumed_from and files(tmp_path) == expected
    (tmp_path / "a.png").unlink()
    with pytest.raises(Stopped):
        upscale(request, {}, in_second_phase)
    Image.new("RGB", (96, 64)).save("in.png")  # another picture under the same name
    with pytest.raises(UsageError, match=r"image/in\.png with other content"):
        upscale(request, {})


def test_what_is_finished_is_not_done_again(make, tmp_path, phases):
    with pytest.raises(Stopped):
        make(stopping_at("write"))
    done = len(phases)
    report = make()
    assert report.resumed_from == "the finished latents" and len(phases) == done
    kinds = [stage.kind for stage in report.stages]
    assert kinds == ["load", "hash", "load", "decode", "write"]  # no text encoder, no UNet


def stopping_at(stage: str):
    def observer(event):
        if isinstance(event, StageStarted) and event.name == stage:
            raise Stopped(15)

    return observer


def test_a_run_says_what_it_went_on_from_and_counts_its_own_steps(make):
    with pytest.raises(Stopped) as stopped:
        make(in_second_phase)
    assert str(stopped.value) == (
        "Stopped by SIGTERM. Saved: step 2 of 3 in phase 2x; the same command goes on from there."
    )
    report = make()
    (stage,) = [stage for stage in report.stages if stage.kind == "denoise"]
    assert (stage.name, stage.steps, report.resumed_from) == ("2x", 1, "step 2 of 3 in phase 2x")


def test_saving_is_counted_and_can_be_seldom(make):
    often, seldom = make(), make(output=Path("b.png"), checkpoint_every=3600.0)
    assert seldom.checkpoints["count"] == 3  # both phases' ends, and the picture that the second begins with
    assert often.checkpoints["count"] > seldom.checkpoints["count"]
    assert often.checkpoints["bytes"] > 0 and 0 < often.checkpoints["seconds"] < often.total_seconds


def test_fresh_begins_anew(make, tmp_path):
    with pytest.raises(Stopped):
        make(in_second_phase)
    assert make(fresh=True).resumed_from is None
    assert set(files(tmp_path)) == {"a.png"}


def test_a_changed_request_is_refused_by_the_names_of_what_changed(make, tmp_path):
    with pytest.raises(Stopped):
        make(in_second_phase)
    before = (tmp_path / "a.png.linfusion" / "journal.json").read_bytes()
    with pytest.raises(UsageError, match=r"now --seed 3 instead of 0; --steps 5 instead of 4\..*--fresh"):
        make(seed=3, steps=(5,))
    assert (tmp_path / "a.png.linfusion" / "journal.json").read_bytes() == before
    report = make(ram=8 << 30, dpi=72.0, preview=Path("small.jpg"))  # which change no latents
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
    made = CheckpointStore(tmp_path / "a.png").read().head
    monkeypatch.setitem(plan.STRIP_SIZES, "cpu", (StripSize(2, 128),))
    threads = torch.get_num_threads()
    monkeypatch.setattr(load, "THREADS", threads + 1)
    listener = Listener()
    report = make(listener)
    rows = [stage["mode"]["strips"]["rows"] for stage in report.plan["stages"] if stage["name"] == "2x"]
    assert rows == [16] and made["threads"] == threads == torch.get_num_threads()
    assert not any("rounding" in notice.text for notice in listener.of(Notice))


def test_a_plan_that_no_longer_fits_is_changed_and_told(make, monkeypatch):
    with pytest.raises(Stopped):
        make(in_second_phase)
    monkeypatch.setitem(plan.STRIP_SIZES, "cpu", (StripSize(2, 128),))
    fits, seen = plan.fits, []
    monkeypatch.setattr(plan, "fits", lambda *given: fits(*given) and len(seen.append(given) or seen) % 2 == 0)
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
    told = [notice.text for notice in listener.of(Notice)]
    assert len(told) >= 1 and all("could not be kept" in text and "The run goes on" in text for text in told)
    assert report.checkpoints["count"] == 0 and set(files(tmp_path)) == {"a.png"}


def test_a_run_in_the_way_is_told(make, tmp_path):
    store = CheckpointStore(tmp_path / "a.png").folder
    store.mkdir()
    with locked_elsewhere(store / LOCK), pytest.raises(TemporaryFailure, match="Another run is writing"):
        make()
    make()


def test_killed_after_the_rename_it_is_complete(make, tmp_path, monkeypatch):
    """The file has its name, and the journal could not go any more."""
    with monkeypatch.context() as patch:
        patch.setattr(manager.CheckpointManager, "complete", lambda self: None)
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
        patch.setattr(manager.CheckpointManager, "complete", lambda self: None)
        make(preview=Path("small.jpg"))
    expected = files(tmp_path)
    (tmp_path / "small.jpg").unlink()
    assert make(preview=Path("small.jpg")).resumed_from == "the finished latents"
    assert files(tmp_path) == expected


def test_a_file_of_another_is_never_taken_for_ours(make, tmp_path):
    with pytest.raises(Stopped):
        make(stopping_at("write"))
    (tmp_path / "a.png").write_text("precious")
    with pytest.raises(CannotCreateOutput, match="exists"):
        make()
    assert (tmp_path / "a.png").read_text() == "precious" and (tmp_path / "a.png.linfusion").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "no json", "version"])
def test_a_journal_that_cannot_be_used_is_set_aside(make, tmp_path, damage):
    with pytest.raises(Stopped):
        make(in_second_phase)
    folder = tmp_path / "a.png.linfusion"
    manifest, tensors = folder / "journal.json", max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    elif damage == "flipped":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x55")
    elif damage == "gone":
        tensors.unlink()
    elif damage == "no json":
        manifest.write_text("[" * 100_000)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manager, "__version__", "0.0.1")
            shutil.rmtree(folder)
            with pytest.raises(Stopped):
                make(in_second_phase)
    listener = Listener()
    assert make(listener).resumed_from is None
    (told,) = [notice.text for notice in listener.of(Notice) if "begins anew" in notice.text]
    assert ("another version" if damage == "version" else "damaged") in told
    assert (tmp_path / "a.png.linfusion.aside-1").is_dir() and not folder.exists()


def test_without_prompts_in_files_the_journal_proves_whose_they_are(make, tmp_path, monkeypatch):
    hidden = {"prompt_metadata": False, "preview": Path("small.png")}
    with monkeypatch.context() as patch:
        patch.setattr(manager.CheckpointManager, "complete", lambda self: None)
        make(**hidden)
    store = CheckpointStore(tmp_path / "a.png").read()
    assert make(**hidden).already_complete
    with CheckpointStore(tmp_path / "a.png").held() as left:
        left.save(store.head, store.parts)
    with pytest.raises(CannotCreateOutput):  # of the same settings, which are all that the file tells
        make(prompt="a sea", **hidden)


def test_a_stop_before_the_first_step_tells_of_what_is_saved(make):
    with pytest.raises(Stopped):
        make(in_second_phase)
    with pytest.raises(Stopped, match="What an earlier run has reached is still saved; the same command goes on"):
        make(stopping_at("vae"))
    with pytest.raises(Stopped, match="step 2 of 3 in phase 2x; without --fresh the same command goes on"):
        make(in_second_phase, fresh=True)


def test_a_failed_write_tells_that_the_latents_are_kept(make, monkeypatch):
    monkeypatch.setattr("linfusion_cli.images.AtomicFile.commit", no_space)
    with pytest.raises(WriteFailed, match=r"No space left\. Saved: the finished latents; the same command goes on"):
        make()


def test_a_phase_s_image_is_not_taken_for_the_image(make, tmp_path):
    """It says the same of itself, and is smaller."""
    make(save_phases=True, output=Path("b.png"))
    (tmp_path / "b-64x64.png").rename(tmp_path / "a.png")
    (tmp_path / "a.png.linfusion").mkdir()  # as if a run had been killed here
    with pytest.raises(CannotCreateOutput):
        make(save_phases=True)


def test_the_same_image_by_another_path_is_the_same(xl_model, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 90).convert("RGB").save("in.png")
    values = {"size": Size(128, 128), "model": str(xl_model), "steps": (4,), "output": tmp_path / "a.png"}
    with pytest.raises(Stopped):
        upscale(UpscaleRequest(image=Path("in.png"), checkpoint_every=0, **values), {}, stopping_at("write"))
    report = upscale(UpscaleRequest(image=tmp_path / "in.png", checkpoint_every=0, **values), {})
    assert report.resumed_from == "the finished latents"


def test_changed_configs_are_refused(make, xl_model, tmp_path):
    folder = shutil.copytree(xl_model, tmp_path / "model")
    with pytest.raises(Stopped):
        make(in_second_phase, model="model")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("scaled_linear", "linear"))
    with pytest.raises(UsageError, match=r"scheduler/scheduler_config\.json with other content"):
        make(model="model")
