"""Latents that were kept become the very picture that their run made, or another file of it."""

import json
import shutil
from dataclasses import replace
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
from linfusion_cli.run.pipeline import generate, upscale
from linfusion_cli.settings.request import GenerateRequest, UpscaleRequest


@pytest.fixture
def made(xl_model, tmp_path, monkeypatch):
    """A picture a.png of 96 x 112 px, and its latents."""
    monkeypatch.chdir(tmp_path)
    values = {"prompt": "a hill", "size": Size(96, 112), "model": str(xl_model), "steps": (3,), "strength": (0.5,)}
    request = GenerateRequest(**values, output=Path("a.png"), keep_latents=Path("a.safetensors"), dither=True, seed=4)
    generate(request, {})
    return request


def decoded(path="a.safetensors", **given):
    kept = open_latents(Path(path))
    origins, request = build_decode_request(kept, given)
    return decode(kept, request, origins)


def seen(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_image_is_that_of_the_run(made, tmp_path):
    report = decoded(output=Path("b.png"))
    assert np.array_equal(seen("b.png"), seen("a.png"))
    one, other = read_info("a.png").request, read_info("b.png").request
    assert {name for name in one if one[name] != other[name]} == {"output", "keep_latents"}
    assert [stage.kind for stage in report.stages] == ["load", "hash", "load", "decode", "write"]
    assert report.settings["bits"].startswith("latents") and report.settings["output"] == "flag"
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"a.png", "a.safetensors", "b.png"}


def test_another_format_and_another_vae(made, xl_model):
    vae = shutil.copytree(xl_model / "vae", Path("vae"))
    report = decoded(output=Path("b.tif"), bits=16, compression="zstd", vae=str(vae), prompt_metadata=False)
    info = read_info("b.tif")
    assert (info.bits, info.compression, info.width_px, info.height_px) == (16, "zstd", 96, 112)
    assert "prompt" not in info.request and info.request["vae"] == str(vae)
    assert [weights["path"] for weights in report.weights] == [str(vae / "diffusion_pytorch_model.safetensors")]
    assert decoded().output == "a.tif"


def test_what_made_them_need_not_be_here_any_more(xl_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 90).convert("RGB").save("in.png")
    values = {"image": Path("in.png"), "size": Size(96, 64), "model": str(xl_model), "steps": (2,)}
    upscale(UpscaleRequest(**values, output=Path("a.png"), keep_latents=Path("a.safetensors")), {})
    Path("in.png").unlink()
    decoded(output=Path("b.png"))
    assert np.array_equal(seen("b.png"), seen("a.png"))


def test_a_image_below_the_base_is_reduced_again(xl_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"prompt": "x", "size": Size(72, 64), "model": str(xl_model), "steps": (2,)}
    generate(GenerateRequest(**values, output=Path("a.png"), keep_latents=Path("a.safetensors")), {})
    decoded(output=Path("b.png"))
    assert np.array_equal(seen("b.png"), seen("a.png"))


def test_what_a_run_has_left_in_its_journal_does_too(made, monkeypatch):
    def fail(self):
        raise WriteFailed("No space left.")

    unfinished = replace(made, output=Path("c.png"), keep_latents=None)
    with monkeypatch.context() as patch:
        patch.setattr("linfusion_cli.images.AtomicFile.commit", fail)
        with pytest.raises(WriteFailed):
            generate(unfinished, {})
    decoded("c.png.linfusion", output=Path("b.png"))
    assert np.array_equal(seen("b.png"), seen("a.png"))
    manifest = Path("c.png.linfusion/journal.json")
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(DataError, match="no whole journal"):
        open_latents(Path("c.png.linfusion"))
    manifest.unlink()
    with pytest.raises(DataError, match="no finished latents"):
        open_latents(Path("c.png.linfusion"))


def test_what_is_there_is_refused(made):
    with pytest.raises(CannotCreateOutput, match="exists"):
        decoded(output=Path("a.png"))


def test_latents_of_another_model_are_refused(made, sd_model):
    with pytest.raises(DataError, match=r"a\.safetensors is no picture of 96x112 by"):
        decoded(output=Path("b.png"), model=str(sd_model))


def test_other_files_are_refused(made, xl_model):
    with pytest.raises(InputNotFound):
        open_latents(Path("nowhere.safetensors"))
    with pytest.raises(DataError, match="not a whole safetensors"):
        open_latents(Path("a.png"))
    with pytest.raises(DataError, match="holds no latents"):
        open_latents(xl_model / "vae" / "diffusion_pytorch_model.safetensors")


def test_no_damage_is_a_bug(made):
    """Cut or flipped anywhere: refused, or a file like another; never an error that is none of ours."""
    whole = Path("a.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    for at in range(0, header, 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        Path("bad.safetensors").write_bytes(damaged if at % 3 else whole[:at])
        try:
            build_decode_request(open_latents(Path("bad.safetensors")), {})
        except DataError:
            pass


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
def test_latents_whose_metadata_are_not_ours_are_data(made, name, value):
    """From the request to the report: whatever `decode` reads of them is checked before it begins."""
    latents = open_latents(Path("a.safetensors"))
    told = dict(latents.made_with)
    told.pop(name) if value is MISSING else told.update({name: value})
    note = json.dumps({"phase_size": str(latents.phase_size), "made_with": told})
    save_file({"latents": latents.read()}, "b.safetensors", {"linfusion": note})
    with pytest.raises(DataError, match=r"b\.safetensors"):
        decoded("b.safetensors", output=Path("b.png"))


@pytest.mark.parametrize("notes", [None, {}, {"format": "pt"}, {"linfusion": "[]"}, {"linfusion": "null"}])
def test_latents_without_metadata_are_data(made, notes):
    save_file({"latents": open_latents(Path("a.safetensors")).read()}, "b.safetensors", notes)
    with pytest.raises(DataError, match=r"b\.safetensors holds no latents"):
        decoded("b.safetensors", output=Path("b.png"))


def test_latents_of_version_0_1_have_no_dtypes(made):
    latents = open_latents(Path("a.safetensors"))
    told = {name: value for name, value in latents.made_with.items() if name != "dtypes"}
    note = json.dumps({"phase_size": str(latents.phase_size), "made_with": told})
    save_file({"latents": latents.read()}, "b.safetensors", {"linfusion": note})
    decoded("b.safetensors", output=Path("b.png"))
    assert np.array_equal(seen("b.png"), seen("a.png"))
