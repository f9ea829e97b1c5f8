"""`linfusion presets`, and what presets define for other commands."""

import json

import pytest
from PIL import Image

DRY = ("--dry-run", "--json")


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """The user's folder of presets, with one of each kind."""
    folder = tmp_path / "config" / "linfusion" / "presets"
    folder.mkdir(parents=True)
    (folder / "mine.toml").write_text("model = 'demo'\nprompt = 'mine'\nsize = '640x512'\nsteps = 2")
    (folder / "broken.toml").write_text("modell = 'demo'")
    (folder / "demo.toml").write_text("model = 'demo'")
    return folder


def test_the_list_shows_size_and_source_of_each_and_survives_a_broken_file(cli, presets):
    code, out, err = cli("presets", "list")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and {"demo", "sdxl", "mine"} <= rows.keys()
    assert str(presets) in rows["mine"] and "640x512" in rows["mine"] and "built in" in rows["demo"]
    assert "2048x2048" in rows["demo"] and "4096x4096" in rows["sdxl"]
    assert f"{presets / 'broken.toml'}:1" in err and str(presets / "demo.toml") in err and "broken" not in rows


def test_show_prints_the_file(cli, presets):
    assert cli("presets", "show", "mine")[1] == (presets / "mine.toml").read_text() + "\n"
    code, out, err = cli("presets", "show", "nope")
    assert (code, out) == (2, "") and "'nope'" in err and "mine" in err


@pytest.mark.parametrize(("options", "size"), [((), "2048x2048"), (("--preset", "mine"), "640x512")])
def test_a_preset_defines_the_default_size(cli, presets, options, size):
    code, out, _ = cli("plan", "a lake", "--json", *options)
    report = json.loads(out)
    assert code == 0 and report["request"]["size"] == size


def test_a_size_that_is_given_wins(cli, presets):
    assert json.loads(cli("plan", "a", "--json", "--preset", "mine", "--size", 128)[1])["request"]["size"] == "128x128"


def test_jobs_have_the_presets_size_and_upscaling_doubles_the_image(cli, presets, tmp_path):
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a hill"}\n')
    code, out, _ = cli(
        "batch", "jobs.jsonl", "--preset", "mine", "--name", "{index}-{size}", "--output-dir", "out", *DRY
    )
    assert code == 0 and "1-640x512" in out
    Image.new("RGB", (64, 80)).save(tmp_path / "image.png")
    planned = json.loads(cli("plan", "--image", "image.png", "--preset", "mine", "--json")[1])
    assert (planned["request"]["size"], planned["settings"]["size"]) == ("128x160", "default")


def test_a_preset_without_a_model_needs_one(cli, presets):
    (presets / "steps.toml").write_text("steps = 2\nsize = 64\nprompt = 'a'")
    code, out, err = cli("plan", "--preset", "steps")
    assert (code, out) == (2, "") and "model" in err
    assert cli("plan", "--preset", "steps", "--model", "demo")[0] == 0
    assert cli("doctor")[0] == 0
