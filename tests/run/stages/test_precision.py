"""A run stops at the first NaN or Inf that a model predicts; the last finite state is saved and can be resumed."""

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
from linfusion_cli.images import read_info
from linfusion_cli.planning import machine
from linfusion_cli.run.pipeline import generate, run_pipeline
from linfusion_cli.settings.request import Request
from linfusion_cli.unet import predict
from tests.support.fakes import Listener
from tests.support.requests import make_request

UNET = Path("unet", "diffusion_pytorch_model.safetensors")


@pytest.fixture
def request_of(xl_model, tmp_path, monkeypatch):
    """Return a function that builds a request for a copy of the model: two phases of four steps, without guidance."""
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(xl_model, tmp_path / "model")

    def build(**changed) -> Request:
        values = {"prompt": "a hill", "size": Size(128, 128), "model": str(model), "steps": (4,), "strength": (1.0,)}
        values |= {"output": Path("a.png"), "checkpoint_every": 3600.0, "guidance_scale": (1.0,)}
        return make_request(**values | changed)

    return build


@pytest.fixture
def forwards(monkeypatch):
    """Count the UNet's forwards. With `bad = (number, value)`, predictions from that forward on contain the value."""

    class Forwards:
        count, bad = 0, (0, 0.0)

    forwards = Forwards()

    def count_calls(forward):
        def run(self, *inputs):
            prediction = forward(self, *inputs)
            forwards.count += 1
            if 0 < forwards.bad[0] <= forwards.count:
                prediction = prediction.clone()
                prediction[0, 1, 2, 3] = forwards.bad[1]
            return prediction

        return run

    for kind in (predict.WholeUNet, predict.StripUNet):
        monkeypatch.setattr(kind, "_forward", count_calls(kind._forward))
    return forwards


def read_checkpoint(name: str = "a.png"):
    return CheckpointStore(Path(name)).read()


def rewrite_weights(model: Path) -> None:
    """Write the same tensors to a file with another hash."""
    tensors = load_file(model / UNET)
    save_file(tensors, model / UNET, metadata={"format": "pt", "repaired": "yes"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("bad", "phase", "steps", "name"), [(3, 0, 2, "base"), (7, 1, 2, "2x")])
def test_it_stops_at_once_and_saves_the_last_finite_state(request_of, forwards, value, bad, phase, steps, name):
    forwards.bad = (bad, value)
    with pytest.raises(NonFinite) as stopped:
        generate(request_of(), {}, Listener())
    assert forwards.count == bad and stopped.value.exit_code == 65
    assert f"at step {steps + 1} of 4 in phase {name} (float32)" in str(stopped.value)
    assert f"step {steps} of 4 in phase {name};" in str(stopped.value)
    found = read_checkpoint()
    assert found.state["phase_state"]["phase"] == phase and found.state["run_state"]["steps"] == steps
    assert found.state["run_state"]["latents"].isfinite().all() and not Path("a.png").exists()


@pytest.mark.parametrize("scheduler", ["euler-a", "dpmpp-2m", "unipc"])
def test_a_repaired_model_resumes_the_run(request_of, forwards, scheduler):
    """The result equals that of an uninterrupted run: the weights themselves are not at fault here."""
    generate(request_of(output=Path("one-go.png"), scheduler=scheduler), {}, Listener())
    forwards.count, forwards.bad = 0, (7, math.nan)
    with pytest.raises(NonFinite):
        generate(request_of(scheduler=scheduler), {}, Listener())
    rewrite_weights(Path("model"))
    forwards.count, forwards.bad, listener = 0, (0, 0.0), Listener()
    report = generate(request_of(scheduler=scheduler), {}, listener)
    assert forwards.count == 2 and report.resumed_from == "step 2 of 4 in phase 2x"
    assert any("unet" in notice.text and "new content" in notice.text for notice in listener.of(Notice))
    assert read_pixels("a.png") == read_pixels("one-go.png") and not Path("a.png.linfusion").exists()


def read_pixels(name: str) -> bytes:
    from PIL import Image

    return Image.open(name).tobytes()


def test_the_same_command_without_a_repair_fails_at_the_same_step(request_of, forwards):
    for bad in (6, 1):  # counted per run: the second run starts with the failed step
        forwards.count, forwards.bad = 0, (bad, math.nan)
        with pytest.raises(NonFinite, match="step 2 of 4 in phase 2x"):
            generate(request_of(), {}, Listener())
        assert forwards.count == bad


def test_a_run_stopped_for_another_reason_accepts_no_other_dtype_or_weights(request_of, forwards):
    def stop(event):
        if forwards.count == 2:
            raise Stopped(15)

    with pytest.raises(Stopped):
        generate(request_of(), {}, stop)
    with pytest.raises(UsageError, match="--dtype .*float32.*auto"):
        generate(request_of(dtype="float32"), {}, Listener())
    rewrite_weights(Path("model"))
    with pytest.raises(UsageError, match="diffusion_pytorch_model"):
        generate(request_of(), {}, Listener())


def test_a_resumed_run_that_predicts_nan_can_be_repaired_too(request_of, forwards):
    """The first step of the resumed run fails: the checkpoint was saved by the earlier run, without a NaN mark."""

    def stop(event):
        if forwards.count == 2:
            raise Stopped(15)

    with pytest.raises(Stopped):
        generate(request_of(), {}, stop)
    forwards.count, forwards.bad = 0, (1, math.nan)
    with pytest.raises(NonFinite, match="step 2 of 4 in phase base"):
        generate(request_of(), {}, Listener())
    forwards.bad = (0, 0.0)
    assert generate(request_of(dtype="float32"), {}, Listener()).resumed_from == "step 2 of 4 in phase base"


def test_nothing_is_left_of_a_run_whose_first_prediction_is_nan(request_of, forwards):
    forwards.bad = (1, math.nan)
    with pytest.raises(NonFinite, match="No progress was saved"):
        generate(request_of(), {}, Listener())
    assert not Path("a.png.linfusion").exists()


@pytest.fixture
def half_on_a_cpu(monkeypatch):
    """Make the dtype `auto` bfloat16, as on a GPU."""
    dtypes = {"auto": torch.bfloat16, "float32": torch.float32}
    monkeypatch.setattr(machine, "pick_dtype", lambda name, device: dtypes[name])


def test_another_dtype_resumes_and_every_file_has_the_dtype_history(request_of, forwards, half_on_a_cpu):
    forwards.bad = (7, math.inf)
    with pytest.raises(NonFinite, match=r"\(float32\)\..*linfusion models check.* --dtype"):
        generate(request_of(), {}, Listener())
    assert forwards.count == 8  # the step that failed was repeated in float32
    in_half = {"phase": 0, "step": 0, "dtype": "bfloat16"}
    forwards.bad, listener = (0, 0.0), Listener()
    again = request_of(dtype="float32", keep_latents=Path("a.safetensors"))
    report = generate(again, {}, listener)
    expected = [in_half, {"phase": 1, "step": 2, "dtype": "float32"}]
    assert any("float32 instead of bfloat16" in notice.text for notice in listener.of(Notice))
    metadata = read_info(Path("a.png")).request
    assert metadata["dtypes"] == report.to_json()["dtypes"] == expected and metadata["dtype"] == "float32"
    from linfusion_cli.run.checkpoint.latents_file import open_latents

    assert open_latents(Path("a.safetensors")).metadata["dtypes"] == expected
    # The requested dtype is part of the request: the file belongs to the second command, not to the first.
    assert run_pipeline(again, None, {}, Listener(), keep_complete=True).already_complete
    with pytest.raises(Exception, match="exists"):
        run_pipeline(request_of(), None, {}, Listener(), keep_complete=True)


def test_latents_that_an_older_version_saved_with_nan_are_set_aside(request_of, forwards):
    forwards.bad = (7, math.nan)
    with pytest.raises(NonFinite):
        generate(request_of(), {}, Listener())
    found = read_checkpoint()
    found.state["run_state"]["latents"][0, 0, 0, 0] = math.nan
    with CheckpointStore(Path("a.png")).lock() as store:
        store.save(found.metadata, found.state)
    forwards.bad, listener = (0, 0.0), Listener()
    assert generate(request_of(), {}, listener).resumed_from is None
    assert any("NaN or Inf" in notice.text and "aside" in notice.text for notice in listener.of(Notice))
    assert Path("a.png").exists()


def test_latents_that_became_nan_after_the_prediction_are_not_saved(request_of, forwards, monkeypatch):
    """The first step of this schedule divides by zero: predictions are finite, latents are not."""
    config = Path("model", "scheduler", "scheduler_config.json")
    values = json.loads(config.read_text()) | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config.write_text(json.dumps(values))
    with pytest.raises(NonFinite, match="NaN or Inf.*--scheduler.*--fresh"):
        generate(request_of(scheduler="ddim", checkpoint_every=0.0), {}, Listener())
    assert forwards.count == 1 and not Path("a.png.linfusion").exists()
    assert generate(request_of(fresh=True), {}, Listener()).output == "a.png"


def test_a_repaired_vae_resumes_the_run(request_of):
    vae = Path("model", "vae", "diffusion_pytorch_model.safetensors")
    good = vae.read_bytes()
    tensors = load_file(vae)
    tensors["decoder.conv_norm_out.weight"] *= 1e20
    tensors["decoder.conv_out.weight"] *= 1e20
    save_file(tensors, vae, metadata={"format": "pt"})
    with pytest.raises(NonFinite, match="VAE.*NaN.*all of phase base"):
        generate(request_of(), {}, Listener())
    vae.write_bytes(good)
    assert generate(request_of(), {}, Listener()).resumed_from == "all of phase base"


def test_nan_in_the_probe_is_reported(request_of, forwards):
    config = Path("model", "scheduler", "scheduler_config.json")
    values = json.loads(config.read_text())
    del values["prediction_type"]
    config.write_text(json.dumps(values))
    forwards.bad = (1, math.nan)
    with pytest.raises(NonFinite, match=r"noise.*\(float32\)"):
        generate(request_of(), {}, Listener())
