import json
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from linfusion_cli.images import open_sink, read_info
from linfusion_cli.images.write import ifd
from tests.images.conftest import make_image, write_unevenly


def write(path, info, pixels, **options):
    sink = open_sink(path, "tiff", (pixels.shape[1], pixels.shape[0]), pixels.dtype.itemsize * 8, info, **options)
    write_unevenly(sink, pixels)
    sink.close()
    return path


def test_tags(tmp_path, info):
    path = write(tmp_path / "out.tif", info, make_image(700, 600))
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert not file.is_bigtiff
        assert (page.tilewidth, page.tilelength) == (512, 512)
        assert (page.compression, page.predictor, page.photometric) == (8, 2, 2)
        assert json.loads(page.description) == info.request | {"file_sha256": read_info(path).file_sha256}
        assert page.software == info.software
        assert page.get_resolution("inch") == (300, 300)
        assert page.tags[700].value.startswith(b"<?xpacket")
        assert page.tags[34675].value[36:40] == b"acsp"
    image = Image.open(path)
    assert image.info["dpi"] == (300, 300)
    assert b"trainedAlgorithmicMedia" in image.info["xmp"]


@pytest.mark.parametrize("size", [(1, 1), (600, 1030)], ids=str)
def test_bigtiff_when_offsets_do_not_fit(tmp_path, info, monkeypatch, size):
    monkeypatch.setattr(ifd, "CLASSIC_LIMIT", 20)
    pixels = make_image(*size)
    path = write(tmp_path / "out.tif", info, pixels, compression="none")
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff
        np.testing.assert_array_equal(file.asarray(), pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
    assert read_info(path).request == info.request


def test_bigtiff_starts_at_four_gib():
    tags = {256: ifd.encode_longs([5]), 324: ifd.encode_longs([16, 2**32 - 9000])}
    header, _, _ = ifd.build_directory(tags, 2**32 - 8000)
    assert struct.unpack("<2sHI", header) == (b"II", 42, 2**32 - 8000)
    header, directory, _ = ifd.build_directory(tags, 2**32 - 80)
    assert struct.unpack("<2sHHHQ", header) == (b"II", 43, 8, 0, 2**32 - 80)
    assert len(directory) == 8 + 2 * 20 + 8  # two 32-bit offsets fit into a 64-bit field
    assert ifd.encode_longs([2**32])[0] == ifd.LONG8


@pytest.mark.parametrize(("size", "tile"), [((520, 10), (512, 16)), ((1, 1), (16, 16)), ((600, 700), (512, 512))])
def test_border_tiles_repeat_the_last_pixel(tmp_path, info, size, tile):
    pixels = make_image(*size)
    path = write(tmp_path / "out.tif", info, pixels, compression="none")
    assert read_info(path).tile_px == tile
    across, down = (-(-side // step) for side, step in zip(size, tile, strict=True))
    count = across * down * tile[0] * tile[1] * 3
    tiles = np.fromfile(path, np.uint8, count, offset=ifd.HEADER_BYTES).reshape(down, across, tile[1], tile[0], 3)
    whole = tiles.swapaxes(1, 2).reshape(down * tile[1], across * tile[0], 3)
    padding = ((0, whole.shape[0] - size[1]), (0, whole.shape[1] - size[0]), (0, 0))
    np.testing.assert_array_equal(whole, np.pad(pixels, padding, mode="edge"))
