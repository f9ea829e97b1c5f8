import threading

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from linfusion_cli.core.errors import DataError
from linfusion_cli.images import open_sink
from linfusion_cli.images.read.source import apply_orientation, inspect_source, read_source_rows
from tests.images.conftest import make_image
from tests.images.sources import (
    FORMATS,
    HEIGHT,
    LOSSLESS,
    PIXELS,
    SAVE_OPTIONS,
    TRANSPARENT,
    WIDTH,
    blend,
    fail_on_notice,
    read_pixels,
    save_image,
)

pytestmark = pytest.mark.usefixtures("no_output")


@pytest.mark.parametrize("format", FORMATS)
def test_eight_bits_are_read_as_pillow_reads_them(tmp_path, format):
    path = save_image(tmp_path / "a", PIXELS, format, **SAVE_OPTIONS[format])
    result = inspect_source(path)
    assert (result.format, result.width_px, result.height_px, result.bits) == (format, WIDTH, HEIGHT, 8)
    assert (result.has_alpha, result.orientation, result.stored_size.pair) == (False, 1, (WIDTH, HEIGHT))
    expected = np.asarray(Image.open(path)).astype(float)
    np.testing.assert_allclose(read_pixels(path), expected, atol=2 if format == "jpeg" else 1e-4)


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_sixteen_bits_are_read_exactly(tmp_path, info, format):
    pixels = np.arange(65536, dtype=np.uint16).repeat(3).reshape(512, 128, 3)
    sink = open_sink(tmp_path / "a", format, (128, 512), 16, info)
    sink.write(pixels)
    sink.close()
    result = inspect_source(tmp_path / "a")
    assert result.bits == 16
    rows = np.concatenate(list(read_source_rows(result, None, fail_on_notice)))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(np.rint(rows * 65535), pixels)
    np.testing.assert_allclose(rows, pixels / 65535, atol=1e-7)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(
    "stored", [{}, {"tile": (32, 48)}, {"rowsperstrip": 7, "compression": "lzw"}, {"planarconfig": "separate"}], ids=str
)
def test_a_tiff_of_any_layout_is_read(tmp_path, stored, byteorder):
    pixels = make_image(WIDTH, HEIGHT, 16)
    planes = pixels.transpose(2, 0, 1) if "planarconfig" in stored else pixels
    tifffile.imwrite(tmp_path / "a", planes, photometric="rgb", byteorder=byteorder, **stored)
    np.testing.assert_allclose(read_pixels(tmp_path / "a") * 257, pixels, atol=0.01)


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}])
def test_a_jpeg_of_any_layout_is_read(tmp_path, options):
    path = save_image(tmp_path / "a", PIXELS, "jpeg", quality=95, **options)
    assert (inspect_source(path).held_bytes > 0) == ("progressive" in options)
    assert np.abs(read_pixels(path) - np.asarray(Image.open(path))).max() <= 2


def test_an_interlaced_png_is_read(tmp_path):
    pyvips = pytest.importorskip("pyvips")
    pyvips.Image.new_from_array(PIXELS, interpretation="srgb").pngsave(str(tmp_path / "a"), interlace=True)
    assert inspect_source(tmp_path / "a").held_bytes == PIXELS.nbytes
    np.testing.assert_allclose(read_pixels(tmp_path / "a"), PIXELS, atol=1e-4)


def test_bands_have_256_rows(tmp_path):
    path = save_image(tmp_path / "a", np.tile(PIXELS, (9, 1, 1)), "png")
    bands = list(read_source_rows(inspect_source(path), None, fail_on_notice))
    assert [len(band) for band in bands] == [256, 256, 118]
    np.testing.assert_allclose(np.concatenate(bands) * 255, np.asarray(Image.open(path)), atol=1e-4)


def test_bands_of_a_very_wide_image_are_lower(tmp_path, monkeypatch):
    monkeypatch.setattr("linfusion_cli.images.read.source.BAND_PX", 30 * WIDTH)
    monkeypatch.setattr("linfusion_cli.images.read.source.FETCH_PX", 7 * WIDTH)
    bands = list(read_source_rows(inspect_source(save_image(tmp_path / "a", PIXELS, "png")), None, fail_on_notice))
    assert [len(band) for band in bands] == [30, 30, 10]
    np.testing.assert_allclose(np.concatenate(bands) * 255, PIXELS, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_as_by_pillow(tmp_path, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save_image(tmp_path / "a", PIXELS, format, exif=exif, **SAVE_OPTIONS[format])
    result = inspect_source(path)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert (result.height_px, result.width_px) == expected.shape[:2]
    assert (result.orientation, result.stored_size.pair) == (orientation, (WIDTH, HEIGHT))
    stored = read_pixels(path)
    read_region = apply_orientation(lambda top, bottom, left, right: stored[top:bottom, left:right].copy(), result)
    whole = read_region(0, result.height_px, 0, result.width_px)
    np.testing.assert_allclose(whole, expected, atol=2 if format == "jpeg" else 1e-4)
    for top, bottom, left, right in [(0, 1, 0, 1), (3, 40, 11, 12), (20, 70, 0, 65)]:
        region = read_region(top, bottom, left, right)
        assert region.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(region, whole[top:bottom, left:right])


@pytest.mark.parametrize("format", ["png", "jpeg", "tiff"])
def test_grey_becomes_rgb(tmp_path, format):
    path = save_image(tmp_path / "a", PIXELS[..., 0], format, **SAVE_OPTIONS[format])
    expected = np.asarray(Image.open(path).convert("RGB")).astype(float)
    np.testing.assert_allclose(read_pixels(path), expected, atol=2 if format == "jpeg" else 1e-4)


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_grey_of_sixteen_bits_becomes_rgb(tmp_path, format):
    grey = make_image(WIDTH, HEIGHT, 16)[..., 0]
    path = save_image(tmp_path / "a", grey, format)
    assert inspect_source(path).bits == 16
    np.testing.assert_allclose(read_pixels(path) * 257, grey[..., None].repeat(3, 2), atol=0.01)


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_one_bit_becomes_black_and_white(tmp_path, format):
    path = save_image(tmp_path / "a", Image.fromarray(PIXELS).convert("1"), format)
    assert inspect_source(path).bits == 8
    np.testing.assert_array_equal(read_pixels(path), np.asarray(Image.open(path).convert("RGB")))


def test_miniswhite_is_inverted(tmp_path):
    tifffile.imwrite(tmp_path / "a", PIXELS[..., 0], photometric="miniswhite")
    np.testing.assert_allclose(read_pixels(tmp_path / "a")[..., 0], 255 - PIXELS[..., 0].astype(float), atol=1e-4)


@pytest.mark.parametrize("format", ["png", "tiff"])
@pytest.mark.parametrize("colours", [256, 13, 2])
def test_a_palette_becomes_rgb(tmp_path, format, colours):
    path = save_image(tmp_path / "a", Image.fromarray(PIXELS).quantize(colours), format)
    np.testing.assert_array_equal(read_pixels(path), np.asarray(Image.open(path).convert("RGB")))


def test_a_palette_with_alpha(tmp_path):
    path = save_image(
        tmp_path / "a", Image.fromarray(PIXELS).quantize(16), "png", transparency=bytes([0, 128] + 14 * [255])
    )
    assert inspect_source(path).has_alpha
    expected = blend(np.asarray(Image.open(path).convert("RGBA")), (255, 0, 10))
    np.testing.assert_allclose(read_pixels(path, (255, 0, 10)), expected, atol=1e-3)


@pytest.mark.parametrize("format", LOSSLESS)
def test_an_alpha_channel_is_refused_without_a_background(tmp_path, format):
    result = inspect_source(save_image(tmp_path / "a", TRANSPARENT, format, **SAVE_OPTIONS[format]))
    assert result.has_alpha
    with pytest.raises(DataError, match="a .*--background") as caught:
        read_source_rows(result, None, fail_on_notice)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("format", LOSSLESS)
def test_an_alpha_channel_is_blended_with_the_background(tmp_path, format):
    path = save_image(tmp_path / "a", TRANSPARENT, format, **SAVE_OPTIONS[format])
    expected = blend(np.asarray(Image.open(path)), (255, 128, 0))
    np.testing.assert_allclose(read_pixels(path, (255, 128, 0)), expected, atol=1e-3)


def test_sixteen_bits_with_alpha(tmp_path):
    wide = TRANSPARENT.astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "a", wide, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_allclose(read_pixels(tmp_path / "a", (9, 8, 7)), blend(TRANSPARENT, (9, 8, 7)), atol=1e-3)


def test_premultiplied_alpha_is_supported(tmp_path):
    multiplied = TRANSPARENT.copy()
    multiplied[..., :3] = np.rint(TRANSPARENT[..., :3] * (TRANSPARENT[..., 3:] / 255))
    tifffile.imwrite(tmp_path / "a", multiplied, photometric="rgb", extrasamples=["assocalpha"])
    expected = multiplied[..., :3] + 200 * (1 - multiplied[..., 3:] / 255.0)
    assert np.abs(read_pixels(tmp_path / "a", (200, 200, 200)) - expected).max() < 1.01


def test_grey_with_alpha(tmp_path):
    path = save_image(tmp_path / "a", Image.fromarray(TRANSPARENT).convert("LA"), "png")
    expected = blend(np.asarray(Image.open(path).convert("RGBA")), (1, 2, 3))
    np.testing.assert_allclose(read_pixels(path, (1, 2, 3)), expected, atol=1e-3)


def test_without_alpha_the_background_is_ignored(tmp_path):
    path = save_image(tmp_path / "a", PIXELS, "png")
    np.testing.assert_array_equal(read_pixels(path, (255, 0, 0)), read_pixels(path))


def test_only_the_first_of_several_pages_is_read(tmp_path):
    for format, frames in (("tiff", {}), ("webp", {"lossless": True, "duration": 100})):
        more = [Image.fromarray(255 - PIXELS)]
        path = save_image(tmp_path / format, PIXELS, format, save_all=True, append_images=more, **frames)
        result = inspect_source(path)
        assert (result.width_px, result.height_px) == (WIDTH, HEIGHT)
        background = (0, 0, 0) if result.has_alpha else None
        np.testing.assert_allclose(read_pixels(path, background), PIXELS, atol=1e-3)


def test_the_suffix_is_ignored(tmp_path):
    path = save_image(tmp_path / "a.png", PIXELS, "tiff")
    assert inspect_source(path).format == "tiff"
    np.testing.assert_allclose(read_pixels(path), PIXELS, atol=1e-4)


def test_any_file_name_works(tmp_path):
    path = save_image(tmp_path / "a[page=1]\udcff ü.jpg", PIXELS, "jpeg")
    assert read_pixels(path).shape == PIXELS.shape


@pytest.mark.parametrize("format", FORMATS)
def test_a_reader_that_stops_leaves_no_file_open(tmp_path, format):
    import psutil

    path = save_image(tmp_path / "a", make_image(600, 900), format, **SAVE_OPTIONS[format])
    inspect_source(path)
    before = psutil.Process().num_fds()
    for _ in range(5):
        rows = read_source_rows(inspect_source(path), None, fail_on_notice)
        next(rows)
        rows.close()
    for thread in [thread for thread in threading.enumerate() if thread.name == "jpeg-pipe"]:
        thread.join(10)
    assert psutil.Process().num_fds() <= before
