"""`linfusion info`: metadata and verification of image files."""

import json

import numpy as np
import pytest
from PIL import Image

from linfusion_cli.images import ImageInfo, open_sink

INFO = ImageInfo("linfusion 0.1", 300.0, {"seed": 3}, "", "", "")


def write(path, format, size=(600, 700)):
    sink = open_sink(path, format, size, 8, INFO)
    sink.write(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    sink.close()


@pytest.mark.parametrize(
    ("format", "count", "unit"), [("tiff", 4, "tiles"), ("png", 700, "rows"), ("jpeg", 700, "rows")]
)
def test_verify_reports_the_decoded_units_and_the_checksum(cli, tmp_path, format, count, unit):
    write(tmp_path / "a", format)
    code, out, err = cli("info", "--verify", "a")
    info = json.loads(cli("info", "a", "--verify", "--json")[1])
    assert (code, err) == (0, "") and info["verified"] == {
        "unit": unit, "count": count, "checksum": info["file_sha256"],
    }  # fmt: skip
    assert f"verified: all {count} {unit} decode, checksum {info['file_sha256']} matches\n" in out
    assert "size: 600x700" in out and out.endswith("request:\n  seed: 3\n")


def test_without_verify_there_is_no_verification(cli, tmp_path):
    write(tmp_path / "a", "png")
    assert "verified" not in cli("info", "a")[1]
    assert json.loads(cli("info", "a", "--json")[1])["verified"] is None


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=str)
def test_a_damaged_file_is_65_and_one_line(cli, tmp_path, as_json):
    write(tmp_path / "a.tif", "tiff")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "a.tif").write_bytes(content)
    assert cli("info", "a.tif")[0] == 0
    code, out, err = cli("info", "--verify", "a.tif", *as_json)
    assert (code, out) == (65, "") and len(err.splitlines()) == 1
    assert "a.tif" in err and "tile 1 of 4" in err


def test_a_file_of_another_program_has_no_checksum(cli, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    code, out, _ = cli("info", "--verify", "a.png")
    assert code == 0 and "verified: all 20 rows decode, the file has no checksum" in out
    assert json.loads(cli("info", "--verify", "a.png", "--json")[1])["verified"]["checksum"] is None
    assert cli("info", "--verify", "b.png")[0] == 66
