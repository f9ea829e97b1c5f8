import numpy as np
import pytest
from PIL import Image

from linfusion_cli.core.errors import CannotCreateOutput, UsageError
from linfusion_cli.images import PreviewSink, read_info
from tests.images.conftest import list_files, make_image, write_unevenly

SIZES = [(256, 256), (255, 100), (640, 1000), (1001, 333), (1, 900), (900, 2), (64, 64)]


def write_preview(path, info, pixels, max_side_px):
    sink = PreviewSink(path, (pixels.shape[1], pixels.shape[0]), pixels.dtype.itemsize * 8, info, max_side_px)
    write_unevenly(sink, pixels)
    sink.close()
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_box_average(tmp_path, info, size, bits):
    pixels = make_image(*size, bits)
    result = write_preview(tmp_path / "a.png", info, pixels, 128)
    scale = min(1, 128 / max(size))
    expected_size = tuple(max(1, round(side * scale)) for side in size)
    whole = Image.fromarray((pixels >> (bits - 8)).astype(np.uint8)).resize(expected_size, Image.Resampling.BOX)
    assert result.shape == (expected_size[1], expected_size[0], 3)
    assert np.abs(result.astype(int) - np.asarray(whole)).mean() < 3
    if max(size) % 128 == 0 and min(size) % (max(size) // 128) == 0:
        assert np.abs(result.astype(int) - np.asarray(whole)).max() <= 1


def test_jpeg_by_suffix_with_metadata(tmp_path, info):
    write_preview(tmp_path / "a.jpg", info, make_image(300, 200), 2048)
    result = read_info(tmp_path / "a.jpg")
    assert (result.format, result.width_px, result.height_px) == ("jpeg", 300, 200)
    assert result.request == info.request
    assert list_files(tmp_path) == ["a.jpg"]


def test_errors_before_any_work(tmp_path, info):
    with pytest.raises(UsageError, match=".jpg"):
        PreviewSink(tmp_path / "a.gif", (10, 10), 8, info)
    (tmp_path / "a.jpg").touch()
    with pytest.raises(CannotCreateOutput, match="exists"):
        PreviewSink(tmp_path / "a.jpg", (10, 10), 8, info)
