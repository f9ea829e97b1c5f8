import dataclasses

import numpy as np
import pytest
from PIL import Image

from linfusion_cli.core.errors import UsageError
from linfusion_cli.images import open_sink, read_info
from tests.images.conftest import PROMPT, list_files, make_image


def write(path, info, pixels):
    sink = open_sink(path, "jpeg", (pixels.shape[1], pixels.shape[0]), 8, info)
    sink.write(pixels)
    sink.close()
    return path


def test_metadata(tmp_path, info):
    path = write(tmp_path / "out.jpg", info, make_image(100, 130))
    image = Image.open(path)
    assert image.info["dpi"] == (300, 300)
    assert b"trainedAlgorithmicMedia" in image.info["xmp"]
    assert image.info["icc_profile"][36:40] == b"acsp"
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be").startswith(PROMPT)


@pytest.mark.parametrize("length", [30_000, 33_000, 70_000, 200_000])
def test_prompts_longer_than_a_segment(tmp_path, info, length):
    prompt = "é" * length
    info = dataclasses.replace(info, prompt=prompt, request={"prompt": prompt}, parameters=prompt)
    path = write(tmp_path / "out.jpg", info, make_image(20, 20))
    np.asarray(Image.open(path))
    result = read_info(path)
    assert result.request == {"prompt": prompt}
    assert result.parameters in (prompt, None)
    assert b"trainedAlgorithmicMedia" in Image.open(path).info["xmp"]


@pytest.mark.parametrize("size", [(65_501, 8), (8, 65_501)])
def test_too_large(tmp_path, info, size):
    with pytest.raises(UsageError, match="65500"):
        open_sink(tmp_path / "out.jpg", "jpeg", size, 8, info)
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("size", [(65_500, 9), (9, 65_500)])
def test_largest_sides(tmp_path, info, size):
    pixels = np.full((size[1], size[0], 3), 100, np.uint8)
    path = write(tmp_path / "out.jpg", info, pixels)
    assert np.abs(np.asarray(Image.open(path)).astype(int) - 100).max() <= 1
