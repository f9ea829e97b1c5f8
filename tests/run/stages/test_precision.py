"""A model that predicts NaN or Inf stops the run at once; the last good state is kept, and can be gone on from."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linfusion_cli.checkpoint.store import CheckpointStore
from linfusion_cli.core.errors import NonFinite, Stopped, UsageError
from linfusion_cli.core.events import Notice
from linfusion_cli.core.geometry import Size
from linfusion_cli.hardware import device
from linfusion_cli.images import read_info
from linfusion_cli.run.pipeline import generate, run_pipeline
from linfusion_cli.settings.request import GenerateRequest
from linfusion_cli.unet import predict
from tests.support.fakes import Listener

UNET = Path("unet", "diffusion_pytorch_model.safetensors")


@pytest.fixture
def request_of(xl_model, tmp_path, monkeypatch):
    """A small request in tmp_path, of a model that may be changed: two phases of four steps, unguided."""
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(xl_model, tmp_path / "model")

    def build(**changed) -> GenerateRequest:
        values = {"prompt": "a hill", "size": Size(128, 128), "model": str(model), "steps": (4,), "strength": (1.0,)}
        values |= {"output": Path("a.png"), "checkpoint_every": 3600.0, "guidance_scale": (1.0,)}
        return GenerateRequest(**values | changed)

    return build


@pytest.fixture
def forwards(monkeypatch):
    """Counts the UNet's forwards; `forwards.bad = (number, value)` puts a value into all predictions from one on."""

    class Forwards:
        count, bad = 0, (0, 0.0)

    found = Forwards()

    def counted(forward):
        def run(self, *inputs):
            prediction = forward(self, *inputs)
            found.count += 1
            if 0 < found.bad[0] <= found.count:
                prediction = prediction.clone()
                prediction[0, 1, 2, 3] = found.bad[1]
            return prediction

        return run

    for kind in (predict.WholeUNet, predict.StripUNet):
        monkeypatch.setattr(kind, "_forward", counted(kind._forward))
    return found


def saved(name: str = "a.png"):
    return CheckpointStore(Path(name)).read()


def rewrite_weights(model: Path) -> None:
    """The same tensors in a file of other content."""
    tensors = load_file(model / UNET)
    save_file(tensors, model / UNET, metadata={"format": "pt", "repaired": "yes"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("bad", "phase", "steps", "name"), [(3, 0, 2, "base"), (7, 1, 2, "2x")])
def test_it_stops_at_once_and_keeps_the_last_good_state(request_of, forwards, value, bad, phase, steps, name):
    forwards.bad = (bad, value)
    with pytest.raises(NonFinite) as stopped:
        generate(request_of(), {}, Listener())
    assert forwards.count == bad and stopped.value.exit_code == 65
    assert f"at step {steps + 1} of 4 in phase {name} (float32)" in str(stopped.value)
    assert f"Saved: step {steps} of 4 in phase {name}" in str(stopped.value)
    found = saved()
    assert found.parts["begun"]["phase"] == phase and found.parts["reached"]["steps"] == steps
    assert found.parts["reached"]["latents"].isfinite().all() and not Path("a.png").exists()


@pytest.mark.parametrize("scheduler", ["euler-a", "dpmpp-2m", "unipc"])
def test_a_repaired_model_goes_on_from_there(request_of, forwards, scheduler):
    """To the same file as a run in one go: what is at fault here is not in the weights."""
    generate(request_of(output=Path("one-go.png"), scheduler=scheduler), {}, Listener())
    forwards.count, forwards.bad = 0, (7, math.nan)
    with pytest.raises(NonFinite):
        generate(request_of(scheduler=scheduler), {}, Listener())
    rewrite_weights(Path("model"))
    forwards.count, forwards.bad, listener = 0, (0, 0.0), Listener()
    report = generate(request_of(scheduler=scheduler), {}, listener)
    assert forwards.count == 2 and report.resumed_from == "step 2 of 4 in phase 2x"
    assert any("unet" in notice.text and "new content" in notice.text for notice in listener.of(Notice))
    assert pixels("a.png") == pixels("one-go.png") and not Path("a.png.linfusion").exists()


def pixels(name: str) -> bytes:
    from PIL import Image

    return Image.open(name).tobytes()


def test_the_same_command_without_any_repair_ends_at_the_same_step(request_of, forwards):
    for bad in (6, 1):  # forwards of this run: the second begins with the step that failed
        forwards.count, forwards.bad = 0, (bad, math.nan)
        with pytest.raises(NonFinite, match="step 2 of 4 in phase 2x"):
            generate(request_of(), {}, Listener())
        assert forwards.count == bad


def test_a_run_that_was_stopped_otherwise_takes_no_other_dtype_and_no_other_weights(request_of, forwards):
    def stop(event):
        if forwards.count == 2:
            raise Stopped(15)

    with pytest.raises(Stopped):
        generate(request_of(), {}, stop)
    with pytest.raises(UsageError, match="--dtype 'float32' instead of 'auto'"):
        generate(request_of(dtype="float32"), {}, Listener())
    rewrite_weights(Path("model"))
    with pytest.raises(UsageError, match="with other content"):
        generate(request_of(), {}, Listener())


def test_a_run_that_goes_on_from_a_stop_and_then_predicts_nan_may_be_repaired_too(request_of, forwards):
    """Its first step fails: what was saved is the earlier run's, which knew nothing of it."""

    def stop(event):
        if forwards.count == 2:
            raise Stopped(15)

    with pytest.raises(Stopped):
        generate(request_of(), {}, stop)
    forwards.count, forwards.bad = 0, (1, math.nan)
    with pytest.raises(NonFinite, match="Saved: step 2 of 4 in phase base"):
        generate(request_of(), {}, Listener())
    forwards.bad = (0, 0.0)
    assert generate(request_of(dtype="float32"), {}, Listener()).resumed_from == "step 2 of 4 in phase base"


def test_nothing_is_left_of_a_run_whose_first_prediction_is_nan(request_of, forwards):
    forwards.bad = (1, math.nan)
    with pytest.raises(NonFinite, match="Nothing was reached"):
        generate(request_of(), {}, Listener())
    assert not Path("a.png.linfusion").exists()


@pytest.fixture
def half_on_a_cpu(monkeypatch):
    """`auto` is bfloat16, as on a card; float32 where it is asked for."""
    dtypes = {"auto": torch.bfloat16, "float32": torch.float32}
    monkeypatch.setattr(device, "pick_dtype", lambda name, device: dtypes[name])


def test_another_dtype_goes_on_and_every_file_says_which_steps_had_which(request_of, forwards, half_on_a_cpu):
    forwards.bad = (7, math.inf)
    with pytest.raises(NonFinite, match=r"\(float32\). Check the weights.* Saved: .* also with another --dtype"):
        generate(request_of(), {}, Listener())
    assert forwards.count == 8  # the step that failed was repeated in float32
    in_half = {"phase": 0, "step": 0, "dtype": "bfloat16"}
    forwards.bad, listener = (0, 0.0), Listener()
    again = request_of(dtype="float32", keep_latents=Path("a.safetensors"))
    report = generate(again, {}, listener)
    expected = [in_half, {"phase": 1, "step": 2, "dtype": "float32"}]
    assert any("float32 instead of bfloat16" in notice.text for notice in listener.of(Notice))
    told = read_info(Path("a.png")).request
    assert told["dtypes"] == report.to_json()["dtypes"] == expected and told["dtype"] == "float32"
    from linfusion_cli.run.checkpoint.latents_file import open_latents

    assert open_latents(Path("a.safetensors")).made_with["dtypes"] == expected
    # The requested dtype identifies a request: the file is that of the second command, not of the first.
    assert run_pipeline(again, None, {}, Listener(), keep_complete=True).already_complete
    with pytest.raises(Exception, match="exists"):
        run_pipeline(request_of(), None, {}, Listener(), keep_complete=True)


def test_latents_that_an_older_version_saved_with_nan_are_set_aside(request_of, forwards):
    forwards.bad = (7, math.nan)
    with pytest.raises(NonFinite):
        generate(request_of(), {}, Listener())
    found = saved()
    found.parts["reached"]["latents"][0, 0, 0, 0] = math.nan
    with CheckpointStore(Path("a.png")).held() as store:
        store.save(found.head, found.parts)
    forwards.bad, listener = (0, 0.0), Listener()
    assert generate(request_of(), {}, listener).resumed_from is None
    assert any("NaN or Inf" in notice.text and "aside" in notice.text for notice in listener.of(Notice))
    assert Path("a.png").exists()


def test_latents_that_became_nan_after_the_prediction_are_not_saved(request_of, forwards, monkeypatch):
    """A schedule whose first step divides by no signal at all: finite predictions, latents that are not."""
    config = Path("model", "scheduler", "scheduler_config.json")
    values = json.loads(config.read_text()) | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config.write_text(json.dumps(values))
    with pytest.raises(NonFinite, match="after a step. Use another --scheduler, with --fresh. Nothing was reached"):
        generate(request_of(scheduler="ddim", checkpoint_every=0.0), {}, Listener())
    assert forwards.count == 1 and not Path("a.png.linfusion").exists()
    assert generate(request_of(fresh=True), {}, Listener()).output == "a.png"


def test_a_repaired_vae_goes_on_too(request_of):
    vae = Path("model", "vae", "diffusion_pytorch_model.safetensors")
    good = vae.read_bytes()
    tensors = load_file(vae)
    tensors["decoder.conv_norm_out.weight"] *= 1e20
    tensors["decoder.conv_out.weight"] *= 1e20
    save_file(tensors, vae, metadata={"format": "pt"})
    with pytest.raises(NonFinite, match="The VAE gives NaN.*Saved: all of phase base"):
        generate(request_of(), {}, Listener())
    vae.write_bytes(good)
    assert generate(request_of(), {}, Listener()).resumed_from == "all of phase base"


def test_a_probe_that_finds_nan_says_so(request_of, forwards):
    config = Path("model", "scheduler", "scheduler_config.json")
    values = json.loads(config.read_text())
    del values["prediction_type"]
    config.write_text(json.dumps(values))
    forwards.bad = (1, math.nan)
    with pytest.raises(NonFinite, match=r"for pure noise \(float32\)"):
        generate(request_of(), {}, Listener())
