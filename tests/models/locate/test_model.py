"""Models, VAEs and LinFusion weights are located; broken and unsupported models are rejected."""

import json
import re
import shutil
from pathlib import Path

import pytest

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.hub import build_download_patterns
from linfusion_cli.models.files.layout import Model, Part, find_weights_files
from linfusion_cli.models.locate.model import (
    DEMO_FOLDER,
    find_linfusion,
    find_model,
    find_vae,
    is_local,
)


@pytest.fixture
def copy(xl_model, tmp_path):
    """A copy of the small model."""
    return shutil.copytree(xl_model, tmp_path / "copy")


def add_to_hub_cache(folder, name):
    """Copy `folder` into the hub cache as repository `name`, in the layout of huggingface_hub."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    commit = "0123456789012345678901234567890123456789"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def test_a_folder_is_found(xl_model):
    assert find_model(str(xl_model)) == Model(xl_model)


def test_demo_is_embedded():
    assert find_model("demo") == Model(DEMO_FOLDER)


def test_a_hub_id_in_the_cache_is_found(xl_model):
    snapshot = add_to_hub_cache(xl_model, "someone/small-xl")
    assert find_model("someone/small-xl") == Model(snapshot)
    assert find_linfusion("someone/small-xl", Model(xl_model), "sdxl") == snapshot


def test_a_vae_is_found_in_a_model_on_its_own_and_in_the_hub(xl_model, tmp_path):
    assert find_vae("auto", Model(xl_model)) == find_vae(str(xl_model), Model(DEMO_FOLDER)) == Part(xl_model / "vae")
    assert find_vae(str(xl_model / "vae"), Model(DEMO_FOLDER)) == Part(xl_model / "vae")
    assert find_vae("demo", Model(xl_model)) == Part(DEMO_FOLDER / "vae")
    snapshot = add_to_hub_cache(xl_model / "vae", "someone/vae")
    assert find_vae("someone/vae", Model(DEMO_FOLDER)) == Part(snapshot)
    with pytest.raises(Unavailable, match="--vae someone/other is not on this machine"):
        find_vae("someone/other", Model(DEMO_FOLDER))
    with pytest.raises(DataError, match="has no config.json"):
        find_vae(str(tmp_path), Model(DEMO_FOLDER))
    with pytest.raises(DataError, match="is not a safetensors file"):
        find_vae(str(xl_model / "vae" / "config.json"), Model(DEMO_FOLDER))


def test_the_error_for_a_hub_id_that_is_not_local_has_a_hint():
    with pytest.raises(Unavailable, match="someone/else is not on this machine") as caught:
        find_model("someone/else")
    assert "--download" in caught.value.hint


@pytest.mark.parametrize(
    "name", ["no/such/folder/anywhere", "./nowhere", "a b", "~nosuchuser/x", "x" * 300, "a/" * 200]
)
def test_a_missing_path_is_unavailable(name):
    with pytest.raises(Unavailable, match=re.escape(name)):
        find_model(name)


def test_a_file_and_a_folder_of_something_else_are_refused(tmp_path):
    file = tmp_path / "model.txt"
    file.write_bytes(b"")
    with pytest.raises(DataError, match="is not a safetensors file"):
        find_model(str(file))
    with pytest.raises(DataError, match=r"model_index\.json"):
        find_model(str(tmp_path))


def test_linfusion_auto_is_the_models_own_else_its_familys(xl_model, sd_model):
    assert find_linfusion("auto", Model(xl_model), "sdxl") == xl_model / "linfusion"
    assert find_linfusion("none", Model(xl_model), "sdxl") is None
    with pytest.raises(Unavailable, match="--linfusion Yuanshi/LinFusion-1-5"):
        find_linfusion("auto", Model(sd_model), "sd15")


def test_facts_come_from_configs_alone(xl_model, sd_model):
    xl, sd = read_facts(Model(xl_model)), read_facts(Model(sd_model))
    assert (xl.family, xl.native_px, xl.vae_factor, xl.multiple_px, xl.is_xl) == ("sdxl", 64, 8, 32, True)
    assert (sd.family, sd.native_px, sd.vae_factor, sd.multiple_px, sd.is_xl) == ("sd15", 64, 8, 64, False)
    assert xl.zeros_for_empty_prompt and not sd.zeros_for_empty_prompt


@pytest.mark.parametrize("text", ["{", "[]", '{"sample_size": 8}'])
def test_a_broken_config_is_named(copy, text):
    (copy / "unet" / "config.json").write_text(text)
    with pytest.raises(DataError, match="(?i)unet"):
        read_facts(Model(copy))


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("unet", {"in_channels": 9}, "9 input channels"),
        ("unet", {"sample_size": [8, 8]}, "sample_size"),
        ("vae", {"latents_mean": [0, 0, 0, 0]}, "latents_mean"),
        ("vae", {"shift_factor": 0.1}, "shift_factor"),
    ],
)
def test_a_model_of_another_kind_is_refused(copy, part, change, named):
    """Inpainting models and similar ones would fail late, or produce wrong colours."""
    file = copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=named):
        read_facts(Model(copy))


def test_a_missing_config_is_named(copy):
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(Unavailable, match=r"vae/config\.json is missing"):
        read_facts(Model(copy))


def test_a_model_is_here_only_with_all_its_weights(copy):
    assert is_local(str(copy)) and not is_local("someone/else")
    (copy / "text_encoder_2" / "model.safetensors").unlink()
    assert not is_local(str(copy))


def test_pickles_are_refused_with_a_way_to_convert(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(DataError, match="pickle") as caught:
        find_weights_files(copy / "unet")
    assert "safetensors" in caught.value.hint


def test_download_fetches_only_missing_files(xl_model, monkeypatch):
    """With --download a complete model needs no network, and an incomplete one is downloaded."""
    snapshot = add_to_hub_cache(xl_model, "someone/small-xl")
    monkeypatch.setattr("linfusion_cli.models.files.hub.download_repository", lambda name, flag: f"downloaded {name}")
    assert find_model("someone/small-xl", download=True) == Model(snapshot)
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert find_model("someone/small-xl", download=True) == Model("downloaded someone/small-xl")
    assert find_linfusion("someone/small-xl", Model(xl_model), "sdxl", download=True) == "downloaded someone/small-xl"
    assert find_model("someone/other", download=True) == Model("downloaded someone/other")


def test_only_required_weights_are_downloaded(monkeypatch):
    files = [
        "README.md",
        "sd_xl_base_1.0.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "vae_1_0/diffusion_pytorch_model.safetensors",
    ]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name, revision: files)
    patterns = build_download_patterns("someone/sdxl")
    weights = [pattern for pattern in patterns if pattern.endswith(".safetensors")]
    assert weights == ["unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    assert "*.json" in patterns and "*/*.json" in patterns


@pytest.mark.parametrize("kind", range(3))
def test_downloads_need_the_option_and_network_errors_are_one_line(monkeypatch, kind):
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    error = [*HfHubHTTPError.__bases__, OfflineModeIsEnabled][kind]("no route\nto host")

    def refuse(name, revision):
        raise error

    monkeypatch.setattr("huggingface_hub.list_repo_files", refuse)
    with pytest.raises(Unavailable, match="not on this machine"):
        find_model("someone/else")
    with pytest.raises(Unavailable, match=r"\(no route\)"):
        find_model("someone/else", download=True)


def test_model_index_names_the_pipeline_class(xl_model):
    index = json.loads((xl_model / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
