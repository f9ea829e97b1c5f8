import os
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from linfusion_cli.images import open_sink
from linfusion_cli.images.write import deflate, png
from linfusion_cli.images.write.deflate import combine_adler32, compress_zlib, deflate_part
from tests.images.conftest import PROMPT, make_image, write_unevenly
from tests.support.system_packages import needs


@pytest.mark.parametrize("sizes", [(0, 0), (1, 0), (0, 5), (3, 70_000), (65_521, 131_042), (1_000_003, 1)])
def test_adler32_combine(sizes):
    first, second = (os.urandom(size) for size in sizes)
    assert combine_adler32(zlib.adler32(first), zlib.adler32(second), sizes[1]) == zlib.adler32(first + second)


@pytest.mark.parametrize("with_isal", [True, False])
def test_deflate_parts_join(monkeypatch, with_isal):
    if not with_isal:
        monkeypatch.setattr(deflate, "isal_zlib", None)
    pieces = [np.frombuffer(os.urandom(size) + b"a" * 5000, np.uint8) for size in (10, 70_000, 1)]
    joined = b"".join(deflate_part(piece) for piece in pieces) + png.LAST_BLOCK
    assert zlib.decompress(joined, -15) == b"".join(piece.tobytes() for piece in pieces)
    assert zlib.decompress(compress_zlib(pieces[0])) == pieces[0].tobytes()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("block_bytes", [1, 5000, 1 << 20])
def test_blocks_of_any_size(tmp_path, info, monkeypatch, bits, block_bytes):
    """Vertical stripes select the filter Up, horizontal ones Sub; both continue across blocks."""
    monkeypatch.setattr(png, "BLOCK_BYTES", block_bytes)
    pixels = make_image(120, 90, bits)
    pixels[30:60] = pixels[30]
    pixels[60:] = pixels[60:, :1]
    path = tmp_path / "out.png"
    sink = open_sink(path, "png", (120, 90), bits, info)
    write_unevenly(sink, pixels)
    sink.close()
    vips = pytest.importorskip("pyvips").Image.new_from_file(str(path), fail_on="warning")
    np.testing.assert_array_equal(vips.numpy(), pixels)


@needs("pngcheck")
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("block_bytes", [1, 5000, 1 << 20])
def test_pngcheck_accepts_blocks_of_any_size(tmp_path, info, monkeypatch, bits, block_bytes):
    monkeypatch.setattr(png, "BLOCK_BYTES", block_bytes)
    sink = open_sink(tmp_path / "out.png", "png", (120, 90), bits, info)
    write_unevenly(sink, make_image(120, 90, bits))
    sink.close()
    result = subprocess.run(["pngcheck", "-q", tmp_path / "out.png"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_filters_are_chosen_by_content():
    stripes = np.tile(np.random.default_rng(0).integers(0, 255, 300, np.uint8), (5, 1))
    assert set(png._filter_rows(stripes, 3)[:, 0]) == {png.UP}
    assert set(png._filter_rows(np.ascontiguousarray(stripes[:, :5].T.repeat(60, axis=1)), 3)[:, 0]) == {png.SUB}


def test_metadata_chunks(tmp_path, info):
    sink = open_sink(tmp_path / "out.png", "png", (8, 8), 8, info)
    sink.write(make_image(8, 8))
    sink.close()
    image = Image.open(tmp_path / "out.png")
    image.load()
    assert image.info["parameters"].startswith(PROMPT)
    assert "trainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]
    assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
    assert image.info["srgb"] == 0
