"""`linfusion models`: list, download and validate models."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from linfusion_cli.models.locate.model import DEMO_FOLDER, FAMILY_BASES
from tests.models.locate.test_model import add_to_hub_cache
from tests.support.fake_hub import COMMIT, serve_hub
from tests.support.small_controlnets import build_small_controlnet, write_controlnet
from tests.support.small_ip_adapters import write_adapter
from tests.support.small_models import build_small_xl_unet, write_linfusion
from tests.support.small_single_files import copy_without_weights, write_original, write_small_sd21

LARGE = 24 << 20  # more than two of the chunks that huggingface_hub writes at a time


def test_list_shows_installed_models(cli, sd_model, tmp_path):
    add_to_hub_cache(sd_model, "someone/small-sd")
    add_to_hub_cache(copy_without_weights(sd_model, tmp_path / "bare"), "someone/configs")
    add_to_hub_cache(DEMO_FOLDER / "linfusion", "someone/linfusion")
    code, out, _ = cli("models", "list")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "SDXL, embedded" in rows["demo"] and str(DEMO_FOLDER) in rows["demo"]
    assert " SD 1.5 " in rows["someone/small-sd"] and COMMIT[:12] in rows["someone/small-sd"]
    assert re.search(r"SD 1\.5.*config", rows["someone/configs"]) and "LinFusion" in rows["someone/linfusion"]
    entries = json.loads(cli("models", "list", "--json")[1])["models"]
    assert {entry["name"]: entry["bytes"] > 0 for entry in entries} == dict.fromkeys(rows.keys() - {"model"}, True)


def test_list_without_a_cache_shows_the_embedded_model(cli):
    code, out, _ = cli("models", "list")
    assert code == 0 and out.splitlines()[1].startswith("demo") and len(out.splitlines()) == 2


def test_check_shows_the_type_of_a_model(cli, xl_model, sd_model, tmp_path):
    assert "SDXL family, 256 px, predicts epsilon" in cli("models", "check", "demo")[1]
    code, out, _ = cli("models", "check", xl_model)
    assert code == 0 and "SDXL family, 64 px" in out and "fits, 11 layers" in out
    assert [line.split()[0] for line in out.splitlines()[2:6]] == ["unet", "vae", "text_encoder", "text_encoder_2"]
    code, out, _ = cli("models", "check", sd_model)
    assert code == 0 and "SD 1.5 family" in out and "Yuanshi/LinFusion-1-5" in out
    out = cli("models", "check", write_small_sd21(tmp_path / "sd21"))[1]
    assert "SD 2.1 family" in out and "predicts v_prediction" in out
    result = json.loads(cli("models", "check", "demo", "--json")[1])
    assert [part["name"] for part in result["parts"]] == ["unet", "vae", "text_encoder", "text_encoder_2"]


def test_check_of_a_single_file(cli, sd_model, tmp_path):
    file = write_original(sd_model, tmp_path / "one.safetensors", "sd15")
    code, _, err = cli("models", "check", file)
    assert code == 69 and "linfusion models pull" in err
    add_to_hub_cache(copy_without_weights(sd_model, tmp_path / "bare"), FAMILY_BASES["sd15"])
    code, out, _ = cli("models", "check", file)
    assert code == 0 and "SD 1.5 family" in out and "probe" in out


def test_check_of_parts_and_loras(cli, xl_model, tmp_path):
    assert "AutoencoderKL" in cli("models", "check", xl_model / "vae")[1]
    assert "11 layers" in cli("models", "check", xl_model / "linfusion")[1]
    lora = {
        "unet.conv_in.lora_A.weight": torch.zeros(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.zeros(8, 2, 1, 1),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    assert "LoRA (layers: 1 in the unet)" in cli("models", "check", tmp_path / "lora.safetensors")[1]


def test_check_of_adapters_and_single_parts(cli, xl_model, tmp_path):
    control = write_controlnet(tmp_path / "control", build_small_controlnet(build_small_xl_unet()))
    assert "ControlNetModel" in cli("models", "check", control)[1]
    add_to_hub_cache(control, "someone/control")
    assert "ControlNetModel" in cli("models", "check", "someone/control")[1]
    adapter = write_adapter(tmp_path / "ip.safetensors", build_small_xl_unet())
    assert "projection_dim" in cli("models", "check", adapter)[1]
    vae = shutil.copy(xl_model / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "vae.safetensors")
    assert "VAE" in cli("models", "check", vae)[1]
    save_file({"clip_l": torch.ones(3, 16), "clip_g": torch.ones(3, 16)}, tmp_path / "word.safetensors")
    assert "textual inversion, vectors: 3 for" in cli("models", "check", tmp_path / "word.safetensors")[1]
    save_file({"control_model.x": torch.zeros(1)}, tmp_path / "control.safetensors")
    assert "ControlNet" in cli("models", "check", tmp_path / "control.safetensors")[2]
    save_file({"some.x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert cli("models", "check", tmp_path / "other.safetensors")[0] == 65
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    code, _, err = cli("models", "check", tmp_path / "model.ckpt")
    assert code == 65 and "pickle" in err


def damage_part(folder, part, change):
    (file,) = (folder / part).glob("*.safetensors")
    save_file(change(load_file(file)), file, {"format": "pt"})


CHANGES = {
    "a missing tensor": lambda tensors: dict(list(tensors.items())[1:]),
    "another shape": lambda tensors: tensors | {min(tensors): torch.zeros(3, 5)},
    "integers": lambda tensors: tensors | {min(tensors): tensors[min(tensors)].to(torch.int32)},
    "not a number": lambda tensors: tensors | {min(tensors): tensors[min(tensors)] * float("nan")},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "linfusion"])
def test_check_fails_with_65_and_names_the_tensor(cli, xl_model, tmp_path, part, change):
    folder = shutil.copytree(xl_model, tmp_path / "copy")
    (file,) = (folder / part).glob("*.safetensors")
    name = min(load_file(file)) if change != "a missing tensor" else next(iter(load_file(file)))
    damage_part(folder, part, CHANGES[change])
    code, out, err = cli("models", "check", folder)
    assert code == 65 and not out and name.removeprefix("text_model.") in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "lost", ["tokenizer/vocab.json", "model_index.json", "unet/diffusion_pytorch_model.safetensors"]
)
def test_check_of_an_incomplete_model(cli, xl_model, tmp_path, lost):
    folder = shutil.copytree(xl_model, tmp_path / "copy")
    (folder / lost).unlink()
    (folder / "tokenizer" / "tokenizer.json").unlink()
    code, _, err = cli("models", "check", folder)
    assert code == (69 if "unet" in lost else 65) and len(err.splitlines()) == 1


def test_linfusion_weights_of_another_model_are_rejected(cli, xl_model, sd_model, tmp_path):
    from linfusion_cli.models.files.layout import Model
    from linfusion_cli.models.load.networks import load_unet

    folder = shutil.copytree(sd_model, tmp_path / "copy")
    write_linfusion(folder / "linfusion", load_unet(Model(xl_model), torch.float32))
    code, _, err = cli("models", "check", folder)
    assert code == 65 and "down_blocks.0.attentions.0.transformer_blocks.0.attn1" in err


@pytest.mark.parametrize(
    ("name", "code"),
    [("demo", 2), (".", 2), ("a b", 2), ("nope", 2), ("sdx", 2), ("no/such/thing/x.bin", 69), ("someone/else", 69)],
)
def test_pull_of_invalid_names(cli, monkeypatch, name, code):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    exit_code, _, err = cli("models", "pull", "-q", name)
    assert exit_code == code and len(err.splitlines()) == 1
    if name in ("a b", "nope", "sdx"):
        assert "sdxl-lightning" in err and ("Did you mean sdxl?" in err) == (name == "sdx")


def run_linfusion(hub, home, *arguments):
    """Run the program in its own process, with `hub` as the Hugging Face hub."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "linfusion_cli", *map(str, arguments)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """The repositories of the hub: the demo model without LinFusion weights, these weights, and a large file."""
    home = tmp_path_factory.mktemp("repositories")
    model = shutil.copytree(DEMO_FOLDER, home / "demo", ignore=shutil.ignore_patterns("linfusion"))
    (home / "large").mkdir()
    (home / "large" / "config.json").write_text("{}")
    (home / "large" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(LARGE))
    return {"a/demo": model, "Yuanshi/LinFusion-XL": DEMO_FOLDER / "linfusion", "a/large": home / "large"}


@pytest.mark.slow
def test_pull_downloads_a_model_and_its_linfusion_weights(repositories, tmp_path):
    with serve_hub(repositories) as hub:
        run = run_linfusion(hub, tmp_path, "models", "pull", "a/demo")
        assert run.returncode == 0 and [line.split()[1] for line in run.stderr.splitlines()] == [
            "a/demo",
            "Yuanshi/LinFusion-XL",
        ]
        assert [f"models--{name}" in run.stdout for name in ("a--demo", "Yuanshi--LinFusion-XL")] == [True, True]
        hub.requests.clear()
        checked = run_linfusion(hub, tmp_path, "models", "check", "a/demo")
        assert checked.returncode == 0 and "LinFusion-XL" in checked.stdout and "fits" in checked.stdout
        generated = run_linfusion(
            hub, tmp_path, "generate", "a sea", "--model", "a/demo", "--size", "64", "--steps", "1", "-q",
            "-o", tmp_path / "out.png",
        )  # fmt: skip
        assert generated.returncode == 0, generated.stderr
        assert hub.requests == []  # neither command connects to the hub


def test_pull_of_configs_only(repositories, tmp_path):
    with serve_hub(repositories) as hub:
        assert run_linfusion(hub, tmp_path, "models", "pull", "a/demo", "--configs").returncode == 0
        assert not any(path.endswith(".safetensors") for _, path, _ in hub.requests)


def test_a_pinned_revision_is_requested(repositories, tmp_path):
    with serve_hub(repositories) as hub:
        assert run_linfusion(hub, tmp_path, "models", "pull", f"a/large@{COMMIT}", "--configs").returncode == 0
        assert any(f"/resolve/{COMMIT}/" in path for _, path, _ in hub.requests)
        assert not any("/main" in path for _, path, _ in hub.requests)


def list_weight_ranges(hub):
    """Return the byte range of each request for the large file; None for the whole file."""
    return [part for method, path, part in hub.requests if method == "GET" and path.endswith(".safetensors")]


def test_a_broken_connection_is_resumed(repositories, tmp_path):
    with serve_hub(repositories) as hub:
        hub.cut_after = 12 << 20
        run = run_linfusion(hub, tmp_path, "models", "pull", "a/large")
        assert run.returncode == 0, run.stderr
        assert list_weight_ranges(hub) == [None, f"bytes={10 << 20}-"]
        assert next((tmp_path / "hub").rglob("snapshots/*/*.safetensors")).stat().st_size == LARGE


def test_a_repeated_pull_downloads_the_missing_files(repositories, tmp_path):
    with serve_hub(repositories) as hub:
        hub.cut_after, hub.refuses_after_cut = 12 << 20, True
        run = run_linfusion(hub, tmp_path, "models", "pull", "a/large")
        assert run.returncode == 69 and "a/large" in run.stderr and "Traceback" not in run.stderr
        hub.refuses_after_cut = False
        hub.requests.clear()
        run = run_linfusion(hub, tmp_path, "models", "pull", "a/large")
        assert run.returncode == 0, run.stderr
        assert list_weight_ranges(hub) == [None] and not any("config.json" in path for _, path, _ in hub.requests)


def test_an_unknown_repository_is_one_line(repositories, tmp_path):
    with serve_hub(repositories) as hub:
        run = run_linfusion(hub, tmp_path, "models", "pull", "a/nothing")
        assert run.returncode == 69 and re.search(r" linfusion: .*a/nothing", run.stderr.splitlines()[-1])


@pytest.mark.slow
def test_generate_with_download_downloads_missing_models(repositories, tmp_path):
    with serve_hub(repositories) as hub:
        options = ("--size", "288", "--steps", "1", "--attention", "linear", "-o", tmp_path / "out.png")
        run = run_linfusion(hub, tmp_path, "generate", "a sea", "--model", "a/demo", *options)
        assert run.returncode == 69 and "--download" in run.stderr and "linfusion models pull a/demo" in run.stderr
        assert hub.requests == []
        run = run_linfusion(hub, tmp_path, "generate", "a sea", "--model", "a/demo", "--download", *options)
        assert run.returncode == 0, run.stderr
