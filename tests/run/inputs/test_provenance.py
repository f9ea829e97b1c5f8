"""Report and metadata contain the SHA-256 of every file that was read."""

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from linfusion_cli.core.geometry import Size
from linfusion_cli.images import read_info
from linfusion_cli.models.files.digest import hash_files
from linfusion_cli.models.locate.model import FAMILY_BASES
from linfusion_cli.run.pipeline import generate
from tests.models.locate.test_model import add_to_hub_cache
from tests.support.requests import make_request
from tests.support.small_single_files import copy_without_weights, write_original


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def make(tmp_path):
    def run(model, **changed):
        values = {"prompt": "a", "size": Size(64, 64), "model": str(model), "steps": (1,), "output": tmp_path / "a.png"}
        return generate(make_request(**values | changed), {})

    return run


def test_every_file_that_was_read_is_hashed(make, xl_model, tmp_path):
    factors = {"A": torch.zeros(2, 4, 3, 3), "B": torch.zeros(8, 2, 1, 1)}
    lora = tmp_path / "style.safetensors"
    save_file({f"unet.conv_in.lora_{side}.weight": factor for side, factor in factors.items()}, lora)
    report = make(xl_model, attention=("linear",), lora=(str(lora),), vae="demo", preview=tmp_path / "small.png")
    uses = {file["use"] for file in report.weights}
    assert uses == {"unet", "text_encoder", "text_encoder_2", "vae", "linfusion", "lora"}
    for file in report.weights:
        assert file["sha256"] == sha256(file["path"]) and file["bytes"] == Path(file["path"]).stat().st_size
    assert "models/demo/vae" in next(file["path"] for file in report.weights if file["use"] == "vae")
    for name in ("a.png", "small.png"):
        named = read_info(tmp_path / name).request["weights"]
        assert {"file": "lora/style.safetensors", "sha256": sha256(lora)} in named and len(named) == len(report.weights)
        assert str(tmp_path) not in str(named)  # metadata must not reveal local paths


def test_files_with_the_same_name_are_distinguished(make, xl_model, tmp_path):
    factors = {"A": torch.zeros(2, 4, 3, 3), "B": torch.zeros(8, 2, 1, 1)}
    loras = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("one", "two")]
    for i, lora in enumerate(loras):
        lora.parent.mkdir()
        save_file({f"unet.conv_in.lora_{side}.weight": factor + i for side, factor in factors.items()}, lora)
    make(xl_model, lora=tuple(map(str, loras)))
    hashes = [entry["sha256"] for entry in read_info(tmp_path / "a.png").request["weights"] if "lora" in entry["file"]]
    assert hashes == [sha256(lora) for lora in loras]


def test_unused_files_are_not_reported(make, xl_model):
    report = make(xl_model, attention=("original",))
    assert "linfusion" not in {file["use"] for file in report.weights}


def test_a_single_file_is_identified_by_the_hash_of_the_file(make, sd_model, tmp_path):
    add_to_hub_cache(copy_without_weights(sd_model, tmp_path / "bare"), FAMILY_BASES["sd15"])
    file = write_original(sd_model, tmp_path / "one.safetensors", "sd15", {"modelspec.prediction_type": "epsilon"})
    report = make(file, linfusion="none")
    assert [entry["use"] for entry in report.weights] == ["model"]
    assert f"Model hash: {sha256(file)[:10]}," in Image.open(tmp_path / "a.png").text["parameters"]


def test_a_file_of_several_uses_is_hashed_once(tmp_path):
    (tmp_path / "one").write_bytes(b"1")
    found = hash_files([("model", tmp_path / "one"), ("vae", tmp_path / "one")])
    assert [(file.use, file.sha256) for file in found] == [("model", hashlib.sha256(b"1").hexdigest())]
