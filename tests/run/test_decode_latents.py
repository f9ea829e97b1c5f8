"""Decoding saved latents gives the image of their run, also with other output settings."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from linfusion_cli.core.errors import CannotCreateOutput, DataError, InputNotFound, WriteFailed
from linfusion_cli.core.geometry import Size
from linfusion_cli.images import read_info
from linfusion_cli.run.checkpoint.latents_file import open_latents
from linfusion_cli.run.decode_latents import build_decode_request, decode
from linfusion_cli.run.pipeline import generate
from tests.support.requests import change_request, make_request


@pytest.fixture
def request_of_run(xl_model, tmp_path, monkeypatch):
    """Generate a.png of 96 x 112 px and its latents a.safetensors. Return the request."""
    monkeypatch.chdir(tmp_path)
    values = {"prompt": "a hill", "size": Size(96, 112), "model": str(xl_model), "steps": (3,), "strength": (0.5,)}
    request = make_request(**values, output=Path("a.png"), keep_latents=Path("a.safetensors"), dither=True, seed=4)
    generate(request, {})
    return request


def decode_file(path="a.safetensors", **given):
    saved_latents = open_latents(Path(path))
    origins, request = build_decode_request(saved_latents, given)
    return decode(saved_latents, request, origins)


def read_pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_image_is_that_of_the_run(request_of_run, tmp_path):
    report = decode_file(output=Path("b.png"))
    assert np.array_equal(read_pixels("b.png"), read_pixels("a.png"))
    one, other = read_info("a.png").request, read_info("b.png").request
    assert one == other
    assert [stage.kind for stage in report.stages] == ["resolve", "plan", "resolve", "load", "decode", "write"]
    assert report.settings["bits"].startswith("latents") and report.settings["output"] == "flag"
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"a.png", "a.safetensors", "b.png"}


def test_another_format_and_another_vae(request_of_run, xl_model):
    vae = shutil.copytree(xl_model / "vae", Path("vae"))
    report = decode_file(output=Path("b.tif"), bits=16, compression="zstd", vae=str(vae), prompt_metadata=False)
    info = read_info("b.tif")
    assert (info.bits, info.compression, info.width_px, info.height_px) == (16, "zstd", 96, 112)
    assert "prompt" not in info.request and info.request["vae"] == str(vae)
    assert [weights["path"] for weights in report.weights] == [str(vae / "diffusion_pytorch_model.safetensors")]
    assert decode_file().output == "a.tif"


def test_the_source_image_is_not_needed(xl_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 90).convert("RGB").save("in.png")
    values = {"image": Path("in.png"), "size": Size(96, 64), "model": str(xl_model), "steps": (2,)}
    generate(make_request(**values, output=Path("a.png"), keep_latents=Path("a.safetensors")), {})
    Path("in.png").unlink()
    decode_file(output=Path("b.png"))
    assert np.array_equal(read_pixels("b.png"), read_pixels("a.png"))


def test_an_image_below_the_base_is_downscaled_again(xl_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"prompt": "x", "size": Size(72, 64), "model": str(xl_model), "steps": (2,)}
    generate(make_request(**values, output=Path("a.png"), keep_latents=Path("a.safetensors")), {})
    decode_file(output=Path("b.png"))
    assert np.array_equal(read_pixels("b.png"), read_pixels("a.png"))


def test_a_checkpoint_with_finished_latents_can_be_decoded(request_of_run, monkeypatch):
    def fail(self):
        raise WriteFailed("No space left.")

    unfinished = change_request(request_of_run, output=Path("c.png"), keep_latents=None)
    with monkeypatch.context() as patch:
        patch.setattr("linfusion_cli.images.AtomicFile.commit", fail)
        with pytest.raises(WriteFailed):
            generate(unfinished, {})
    decode_file("c.png.linfusion", output=Path("b.png"))
    assert np.array_equal(read_pixels("b.png"), read_pixels("a.png"))
    manifest = Path("c.png.linfusion/checkpoint.json")
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"c\.png\.linfusion"):
        open_latents(Path("c.png.linfusion"))
    manifest.unlink()
    with pytest.raises(DataError, match=r"c\.png\.linfusion"):
        open_latents(Path("c.png.linfusion"))


def test_an_existing_output_is_refused(request_of_run):
    with pytest.raises(CannotCreateOutput, match="exists"):
        decode_file(output=Path("a.png"))


def test_latents_of_another_model_are_refused(request_of_run, sd_model):
    with pytest.raises(DataError, match=r"a\.safetensors.* 96x112"):
        decode_file(output=Path("b.png"), model=str(sd_model))


def test_other_files_are_refused(request_of_run, xl_model):
    with pytest.raises(InputNotFound):
        open_latents(Path("nowhere.safetensors"))
    with pytest.raises(DataError, match=r"a\.png"):
        open_latents(Path("a.png"))
    with pytest.raises(DataError, match=r"diffusion_pytorch_model\.safetensors"):
        open_latents(xl_model / "vae" / "diffusion_pytorch_model.safetensors")


def test_a_damaged_file_raises_no_other_error(request_of_run):
    """A truncated file or a flipped bit raises DataError or is not detected; no other error is raised."""
    content = Path("a.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little") + 8
    for at in range(0, header, 7):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        Path("bad.safetensors").write_bytes(damaged if at % 3 else content[:at])
        with suppress(DataError):
            build_decode_request(open_latents(Path("bad.safetensors")), {})


MISSING = object()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", MISSING),
        ("weights", None),
        ("weights", {}),
        ("weights", ["unet/a.safetensors"]),
        ("weights", [{"file": "unet/a.safetensors"}]),
        ("weights", [{"file": "a.safetensors", "sha256": "0"}]),
        ("weights", [{"file": 5, "sha256": "0"}]),
        ("dtypes", None),
        ("dtypes", 5),
        ("dtypes", ["float32"]),
        ("prompt", MISSING),
        ("model", 5),
        ("size", [1, 2]),
        ("steps", "many"),
    ],
)
def test_latents_with_invalid_metadata_are_a_data_error(request_of_run, name, value):
    """All metadata that `decode` uses are validated before it starts."""
    latents = open_latents(Path("a.safetensors"))
    made_with = dict(latents.metadata)
    made_with.pop(name) if value is MISSING else made_with.update({name: value})
    note = json.dumps({"phase_size": str(latents.phase_size), "made_with": made_with})
    save_file({"latents": latents.read()}, "b.safetensors", {"linfusion": note})
    with pytest.raises(DataError, match=r"b\.safetensors"):
        decode_file("b.safetensors", output=Path("b.png"))


@pytest.mark.parametrize("notes", [None, {}, {"format": "pt"}, {"linfusion": "[]"}, {"linfusion": "null"}])
def test_latents_without_metadata_are_a_data_error(request_of_run, notes):
    save_file({"latents": open_latents(Path("a.safetensors")).read()}, "b.safetensors", notes)
    with pytest.raises(DataError, match=r"b\.safetensors"):
        decode_file("b.safetensors", output=Path("b.png"))


def test_latents_of_version_0_1_have_no_dtypes(request_of_run):
    latents = open_latents(Path("a.safetensors"))
    made_with = {name: value for name, value in latents.metadata.items() if name != "dtypes"}
    note = json.dumps({"phase_size": str(latents.phase_size), "made_with": made_with})
    save_file({"latents": latents.read()}, "b.safetensors", {"linfusion": note})
    decode_file("b.safetensors", output=Path("b.png"))
    assert np.array_equal(read_pixels("b.png"), read_pixels("a.png"))
