"""`linfusion plan`: needs no weights, and shows the plan that a run executes."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def model(xl_model, tmp_path):
    """A model folder with config files only."""
    folder = Path(shutil.copytree(xl_model, tmp_path / "configs"))
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def test_a_plan_needs_config_files_only_and_leaves_no_file(cli, model, tmp_path):
    before = set(tmp_path.rglob("*"))
    code, out, err = cli("plan", "a hill", "--model", model, "--size", "256x128", "--steps", 4)
    assert (code, err) == (0, "")
    for text in ("base", "2x", "original", "linear", "rows", "total", "Budget on cpu", "steps", "flag", "default"):
        assert text in out
    assert set(tmp_path.rglob("*")) == before


def test_a_plan_as_json_is_the_plan_of_the_run(cli, model, xl_model):
    options = ["a hill", "--size", 128, "--steps", 4, "--strength", 0.5]
    planned = json.loads(cli("plan", *options, "--model", model, "--json")[1])
    assert planned["settings"]["steps"] == "flag" and planned["disk_bytes"] > 128 * 128 * 3
    report = json.loads(cli("generate", *options, "--model", xl_model, "-o", "a.png", "--json")[1])
    for one, other in zip(planned["plan"]["stages"], report["plan"]["stages"], strict=True):
        for key in ("kind", "phase_name", "strategy", "steps"):
            assert one[key] == other[key]


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--ram", "1MiB"], 71, "--ram"),
        (["--ram", "many"], 2, "--ram 'many'"),
        (["--ram", "0"], 2, "--ram 0"),
        (["--vram", "12GiB"], 2, "--vram 12.0 GiB"),
        (["--attention", "quadratic"], 2, "--attention 'quadratic'"),
        (["--model", "nobody/nothing"], 69, "nobody/nothing"),
        (["--device", "cuda:7"], 69, "cuda:7"),
    ],
)
def test_an_invalid_option_or_small_budget_is_one_line(cli, model, options, code, text):
    exit_code, out, err = cli("plan", "a hill", "--model", model, "--size", 256, *options)
    assert (exit_code, out) == (code, "") and len(err.splitlines()) == 1 and text in err


def test_the_suggested_budget_is_sufficient(cli, model):
    message = cli("plan", "a hill", "--model", model, "--size", 256, "--ram", "1MiB")[2]
    budget = message.split("--ram ")[1].split()[0]
    assert cli("plan", "a hill", "--model", model, "--size", 256, "--ram", budget)[0] == 0


def test_the_environment_can_set_a_memory_budget(cli, model, monkeypatch):
    monkeypatch.setenv("LINFUSION_RAM", "1MiB")
    assert cli("plan", "a hill", "--model", model, "--size", 256)[0] == 71
    monkeypatch.setenv("LINFUSION_RAM", "much")
    code, _, err = cli("plan", "a hill", "--model", model, "--size", 256)
    assert code == 2 and "LINFUSION_RAM='much'" in err
