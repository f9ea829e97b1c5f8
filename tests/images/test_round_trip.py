"""Written files decode to the same pixels with tifffile, Pillow and libvips."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from linfusion_cli.images import ImageInfo, open_sink, read_info
from tests.images.conftest import list_files, make_image, write_unevenly

SIZES = [(1, 1), (1, 70), (2, 1), (511, 130), (512, 512), (513, 65), (1100, 64), (3, 1100), (1025, 514)]
LOSSLESS = [
    *((suffix, compression, bits) for suffix in ["tif"] for compression in ["deflate", "none"] for bits in (8, 16)),
    *(("tif", compression, bits) for compression in ["zstd", "lzw"] for bits in (8, 16)),
    ("png", None, 8),
    ("png", None, 16),
]
FORMAT = {"tif": "tiff", "png": "png", "jpg": "jpeg"}


def write_image(path: Path, pixels: np.ndarray, info: ImageInfo, compression: str | None = None) -> Path:
    size_px, bits = (pixels.shape[1], pixels.shape[0]), pixels.dtype.itemsize * 8
    sink = open_sink(path, FORMAT[path.suffix[1:]], size_px, bits, info, compression, threads=2)
    write_unevenly(sink, pixels)
    sink.close()
    assert list_files(path.parent) == [path.name]
    return path


def read_with_vips(path: Path) -> np.ndarray:
    pyvips = pytest.importorskip("pyvips")
    return pyvips.Image.new_from_file(str(path), fail_on="warning").numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("suffix", "compression", "bits"), LOSSLESS)
def test_lossless(tmp_path, info, size, suffix, compression, bits):
    pixels = make_image(*size, bits)
    path = write_image(tmp_path / f"out.{suffix}", pixels, info, compression)
    if suffix == "tif":
        np.testing.assert_array_equal(tifffile.imread(path), pixels)
    if bits == 8:  # Pillow has no 16 bit RGB
        np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
    if compression != "zstd":  # not supported by the libtiff of pyvips-binary
        np.testing.assert_array_equal(read_with_vips(path), pixels)
    result = read_info(path)
    assert (result.width_px, result.height_px, result.bits) == (*size, bits)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("quality", [30, 95])
def test_jpeg_equals_a_whole_image(tmp_path, info, size, quality):
    pixels, path = make_image(*size), tmp_path / "out.jpg"
    sink = open_sink(path, "jpeg", size, 8, info, jpeg_quality=quality)
    write_unevenly(sink, pixels)
    sink.close()
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, "JPEG", quality=quality, subsampling=0)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(whole)))
    assert np.abs(read_with_vips(path).astype(int) - np.asarray(Image.open(whole))).max() <= 2
    assert (read_info(path).width_px, read_info(path).height_px) == size


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiff_with_jpeg_tiles(tmp_path, info, size):
    pixels = make_image(*size)
    path = write_image(tmp_path / "out.tif", pixels, info, "jpeg")
    whole = io.BytesIO()  # tiles are aligned to the 8x8 blocks, therefore the blocks are the same
    Image.fromarray(pixels).save(whole, "JPEG", quality=95, subsampling=0)
    expected = np.asarray(Image.open(whole)).astype(int)
    for decoded in (tifffile.imread(path), np.asarray(Image.open(path)), read_with_vips(path)):
        assert decoded.shape == pixels.shape
        assert np.abs(decoded - expected).max() <= 2


@pytest.mark.parametrize(("suffix", "bits"), [("tif", 8), ("tif", 16), ("png", 8), ("png", 16), ("jpg", 8)])
def test_wide_strip(tmp_path, info, suffix, bits):
    pixels = make_image(16384, 40, bits)
    path = write_image(tmp_path / f"out.{suffix}", pixels, info)
    difference = np.abs(read_with_vips(path).astype(int) - pixels).max()
    assert difference == 0 if suffix != "jpg" else difference < 20
    assert (read_info(path).width_px, read_info(path).height_px) == (16384, 40)


def test_all_sixteen_bits_survive(tmp_path, info):
    pixels = np.arange(65536, dtype=np.uint16).repeat(3).reshape(256, 256, 3)
    for suffix in ("tif", "png"):
        (tmp_path / suffix).mkdir()
        path = write_image(tmp_path / suffix / f"out.{suffix}", pixels, info)
        np.testing.assert_array_equal(read_with_vips(path), pixels)


def test_same_rows_same_bytes(tmp_path, info):
    for suffix in ("tif", "png", "jpg"):
        files = []
        for name, threads, seed in (("a", 1, 1), ("b", 3, 2)):
            path, pixels = tmp_path / f"{name}.{suffix}", make_image(600, 700)
            sink = open_sink(path, FORMAT[suffix], (600, 700), 8, info, threads=threads)
            write_unevenly(sink, pixels, seed)
            sink.close()
            files.append(path.read_bytes())
        assert files[0] == files[1]
