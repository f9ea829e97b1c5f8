"""ControlNets on the command line, from the environment, and in a preset."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.support.small_controlnets import build_small_controlnet, build_small_union_controlnet, write_controlnet
from tests.support.small_models import build_small_xl_unet


@pytest.fixture
def here(xl_model, tmp_path):
    """Write two ControlNets and a control image; return the options of a small run."""
    write_controlnet(tmp_path / "net", build_small_controlnet(build_small_xl_unet(), 1))
    write_controlnet(tmp_path / "union", build_small_union_controlnet(build_small_xl_unet(), 2))
    numbers = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(numbers).save(tmp_path / "edges.png")
    return "a hill", "--model", xl_model, "--size", 64, "--steps", 1, "-o", "a.png"


def test_options_are_repeated_for_each_controlnet(cli, here):
    first = ("--controlnet", "net", "--control-image", "edges.png", "--control-scale", 0.5)
    second = ("--controlnet", "union", "--control-image", "edges.png", "--control-scale", 0, "--control-type", "depth")
    code, out, err = cli("generate", *here, *first, *second, "--control-phases", "base,0", "--json")
    assert code == 0, err
    report = json.loads(out)
    nets = [(net["model"], net["image"], net["scale"]) for net in report["request"]["controlnet"]]
    assert nets == [("net", "edges.png", 0.5), ("union", "edges.png", 0.0)]
    assert report["request"]["control_phases"] == ["base", "0"] and report["settings"]["controlnet"] == "flag"
    assert [stage["kind"] for stage in report["stages"]].count("start") == 2
    read = [file["path"] for file in report["weights"] if file["use"] == "controlnet"]
    assert [path.split("/")[0] for path in read] == ["net", "union"]


def test_from_the_environment_and_a_preset(cli, here, tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text('control_image = ["edges.png"]\ncontrol_phases = 0\ncontrol_scale = 0.8\n')
    monkeypatch.setenv("LINFUSION_CONTROLNET", "net")
    code, out, err = cli("plan", *here, "--preset", "mine.toml", "--json")
    assert code == 0, err
    request = json.loads(out)["request"]
    expected = [{"model": "net", "image": "edges.png", "scale": 0.8, "type": None}]
    assert (request["controlnet"], request["control_phases"]) == (expected, ["0"])


def test_tables_in_a_preset_equal_flags_and_flags_replace_all_of_them(cli, here, tmp_path):
    (tmp_path / "mine.toml").write_text(
        '[[controlnet]]\nmodel = "net"\nimage = "edges.png"\nscale = 0.3\n'
        '[[controlnet]]\nmodel = "union"\nimage = "edges.png"\ntype = "depth"\n'
    )
    planned = json.loads(cli("plan", *here, "--preset", "mine.toml", "--json")[1])["request"]["controlnet"]
    assert [(net["model"], net["scale"]) for net in planned] == [("net", 0.3), ("union", 1.0)]
    flags = ("--controlnet", "net", "--control-image", "edges.png")
    planned = json.loads(cli("plan", *here, "--preset", "mine.toml", *flags, "--json")[1])["request"]["controlnet"]
    assert planned == [{"model": "net", "image": "edges.png", "scale": 1.0, "type": None}]


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (("--control-image", "edges.png"), 2, "--control-image"),
        (("--controlnet", "net", "--control-image", "none.png"), 66, "none.png"),
        (("--controlnet", "net", "--control-image", "net/config.json"), 65, "net/config.json"),
        (("--controlnet", "nobody/none", "--control-image", "edges.png"), 69, "--controlnet nobody/none"),
        (("--controlnet", "net", "--control-image", "edges.png", "--control-phases", "2"), 2, "--control-phases 2"),
        (("--controlnet", "union", "--control-image", "edges.png"), 2, "--control-type"),
    ],
)
def test_an_invalid_option_is_one_line(cli, here, tmp_path, options, code, text):
    exit_code, out, err = cli("generate", *here, *options, "-q")
    assert (exit_code, out) == (code, "") and text in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "a.png").exists()


def test_upscaling_uses_controlnets_too(cli, here, tmp_path):
    common = (
        *here[1:3],
        "--prompt",
        "a hill",
        "--size",
        128,
        "--steps",
        2,
        "--strength",
        0.9,
        "--overwrite",
        "-o",
        "b.png",
    )
    control = ("--controlnet", "net", "--control-image", "edges.png", "--control-scale", 5)
    images = []
    for options in ((), control):
        code, _, err = cli("upscale", "edges.png", *common, *options)
        assert code == 0, err
        images.append(np.asarray(Image.open(tmp_path / "b.png")).astype(int))
    assert np.abs(images[0] - images[1]).mean() > 1
