import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from linfusion_cli.core.errors import DataError, InputNotFound
from linfusion_cli.images import open_sink, read_info
from tests.images.conftest import make_image

FORMATS = ["tiff", "png", "jpeg"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from linfusion_cli.images import ImageInfo

    folder = tmp_path_factory.mktemp("images")
    for format in FORMATS:
        info = ImageInfo("s", 240, {"seed": 1}, "", "", "Steps: 1")
        sink = open_sink(folder / format, format, (700, 600), 8, info)
        sink.write(make_image(700, 600))
        sink.close()
    return folder


@pytest.mark.parametrize("format", FORMATS)
def test_all_fields(files, format):
    result = read_info(files / format)
    assert (result.format, result.width_px, result.height_px, result.bits, result.dpi) == (format, 700, 600, 8, 240)
    assert result.compression == ("jpeg" if format == "jpeg" else "deflate")
    assert result.tile_px == ((512, 512) if format == "tiff" else None)
    assert result.file_bytes == (files / format).stat().st_size
    assert result.request == {"seed": 1}
    assert result.parameters == "Steps: 1"


@pytest.mark.parametrize("format", FORMATS)
def test_every_truncation_is_noticed(files, tmp_path, format):
    content = (files / format).read_bytes()
    lengths = {0, 1, 2, 3, 8, 9, 20, 33, 100, 1000, len(content) // 2, len(content) - 1}
    lengths |= {int(length) for length in np.linspace(0, len(content) - 1, 60)}
    for length in lengths:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(DataError) as caught:
            read_info(tmp_path / "cut")
        assert caught.value.exit_code == 65


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_headers_are_data_errors_or_read(files, tmp_path, format):
    content, random = (files / format).read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        tail = len(content) - 6000 if format == "tiff" else 0  # the directory is at the end
        for at in random.integers(tail, tail + 2000, 5):
            damaged[at] = random.integers(0, 256)
        (tmp_path / "damaged").write_bytes(damaged)
        with suppress(DataError):
            read_info(tmp_path / "damaged")


def test_tiles_past_the_end(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", make_image(600, 600), tile=(256, 256), photometric="rgb")  # directory first
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[:-100])
    with pytest.raises(DataError, match="beyond its end"):
        read_info(tmp_path / "a.tif")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(InputNotFound) as caught:
        read_info(tmp_path / "missing.png")
    assert caught.value.exit_code == 66
    with pytest.raises(DataError, match="folder"):
        read_info(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\xff\xd8\xff", b"II*\0" + b"\0" * 20, b"\0" * 5000])
def test_not_an_image(tmp_path, content, caplog):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError):
        read_info(tmp_path / "a")
    assert not caplog.records


def test_sizes_that_pillow_rejects(files, tmp_path):
    png = bytearray((files / "png").read_bytes())
    png[16:24] = struct.pack(">II", 100_000, 200_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (tmp_path / "a").write_bytes(png)
    assert read_info(tmp_path / "a").height_px == 200_000
    jpeg = (files / "jpeg").read_bytes().replace(struct.pack(">BHH", 8, 600, 700), struct.pack(">BHH", 8, 65500, 65500))
    (tmp_path / "a").write_bytes(jpeg)
    assert read_info(tmp_path / "a").width_px == 65_500


def test_files_of_other_software(tmp_path):
    image = Image.fromarray(make_image(50, 40))
    image.save(tmp_path / "a.jpg", progressive=True)
    assert (read_info(tmp_path / "a.jpg").request, read_info(tmp_path / "a.jpg").parameters) == (None, None)
    image.save(tmp_path / "a.tif", description="some words", resolution_unit=3, resolution=100)
    result = read_info(tmp_path / "a.tif")
    assert (result.request, result.tile_px, result.compression, result.dpi) == (None, None, "none", 254.0)
    for add, options in (("add_text", {}), ("add_text", {"zip": True}), ("add_itxt", {"zip": True})):
        texts = PngImagePlugin.PngInfo()
        getattr(texts, add)("parameters", "a\nSteps: 1", **options)
        image.save(tmp_path / "a.png", pnginfo=texts)
        assert read_info(tmp_path / "a.png").parameters == "a\nSteps: 1"
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(b"appended" * 10_000)
    assert read_info(tmp_path / "a.jpg").width_px == 50
