"""The options of IP-Adapters on the command line."""

import json
import shutil

import pytest

from tests.support.small_ip_adapters import write_adapter, write_encoder, write_image
from tests.support.small_models import build_small_xl_unet


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with two adapters, their image encoder and an image."""
    folder = tmp_path_factory.mktemp("adapters")
    write_encoder(folder / "image_encoder")
    for kind in ("plain", "plus"):
        write_adapter(folder / f"{kind}.safetensors", build_small_xl_unet(), kind)
    write_image(folder / "p.png")
    return folder


@pytest.fixture
def arguments(files, tmp_path, xl_model):
    """Arguments of a run that takes a second, with two adapters and their images in the current folder."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    pairs = (f"--ip-adapter {kind}.safetensors --ip-image p.png" for kind in ("plain", "plus"))
    options = [text for pair in pairs for text in pair.split()]
    return ["generate", "a hill", "--model", xl_model, "--size", 64, "--steps", 1, "-o", "a.png", *options]


def test_options_are_repeated_and_the_last_scale_holds(cli, arguments):
    code, out, err = cli(*arguments, "--ip-scale", 0.5, "--json", "--quiet")
    assert (code, err) == (0, "")
    report = json.loads(out)
    adapters = report["request"]["ip_adapter"]
    assert [adapter["scale"] for adapter in adapters] == [0.5, 0.5] and report["settings"]["ip_scale"] == "flag"
    assert all(adapter["model"] and adapter["image"] for adapter in adapters)


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (["--ip-image", "p.png"], 2, "--ip-image"),
        (["--ip-scale", "11"], 2, "--ip-scale 11.0"),
        (["--ip-adapter", "no.safetensors", "--ip-image", "p.png"], 69, "no.safetensors"),
        (["--ip-adapter", "old.bin", "--ip-image", "p.png"], 65, "old.bin"),
        (["--ip-adapter", "plain.safetensors", "--ip-image", "none.png"], 66, "none.png"),
        (["--ip-adapter", "plain.safetensors", "--ip-image", "plain.safetensors"], 65, "plain.safetensors"),
    ],
)
def test_an_invalid_option_is_one_line(cli, arguments, tmp_path, more, code, text):
    exit_code, out, err = cli(*arguments, *more, "--quiet")
    assert (exit_code, out) == (code, "") and len(err.splitlines()) == 1 and text in err
    assert not (tmp_path / "a.png").exists()
