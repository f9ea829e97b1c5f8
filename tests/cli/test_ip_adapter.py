"""IP-Adapter's options on the command line."""

import json
import shutil

import pytest

from tests.support.small_ip_adapters import write_adapter, write_encoder, write_image
from tests.support.small_models import small_xl_unet


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two adapters, their encoder and a picture."""
    folder = tmp_path_factory.mktemp("adapters")
    write_encoder(folder / "image_encoder")
    for kind in ("plain", "plus"):
        write_adapter(folder / f"{kind}.safetensors", small_xl_unet(), kind)
    write_image(folder / "p.png")
    return folder


@pytest.fixture
def given(files, tmp_path, xl_model):
    """Options of a generate of a second, with two adapters and their pictures in the current folder."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    pairs = (f"--ip-adapter {kind}.safetensors --ip-image p.png" for kind in ("plain", "plus"))
    options = [text for pair in pairs for text in pair.split()]
    return ["generate", "a hill", "--model", xl_model, "--size", 64, "--steps", 1, "-o", "a.png", *options]


def test_options_are_repeated_and_the_last_scale_holds(cli, given):
    code, out, err = cli(*given, "--ip-scale", 0.5, "--json", "--quiet")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["request"]["ip_scale"] == [0.5] and report["settings"]["ip_scale"] == "flag"
    assert len(report["request"]["ip_adapter"]) == len(report["request"]["ip_image"]) == 2


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--ip-image", "p.png"], 2, "--ip-image is given 3 times, and --ip-adapter 2 times"),
        (["--ip-scale", "11"], 2, "--ip-scale 11.0 is not possible"),
        (["--ip-adapter", "no.safetensors", "--ip-image", "p.png"], 69, "no such file or folder"),
        (["--ip-adapter", "old.bin", "--ip-image", "p.png"], 65, "is a pickle"),
        (["--ip-adapter", "plain.safetensors", "--ip-image", "none.png"], 66, "none.png does not exist"),
        (["--ip-adapter", "plain.safetensors", "--ip-image", "plain.safetensors"], 65, "is not a PNG"),
    ],
)
def test_what_is_wrong_is_one_sentence(cli, given, tmp_path, more, code, says):
    found, out, err = cli(*given, *more, "--quiet")
    assert (found, out) == (code, "") and len(err.splitlines()) == 1 and says in err
    assert not (tmp_path / "a.png").exists()
