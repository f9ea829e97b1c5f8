import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from linfusion_cli.core.errors import DataError, InputNotFound, LinfusionError
from linfusion_cli.images.read.source import inspect_source, read_source_rows
from tests.images.conftest import make_image
from tests.images.sources import (
    FORMATS,
    HEIGHT,
    LAB_PROFILE,
    PIXELS,
    SAVE_OPTIONS,
    TRANSPARENT,
    WIDTH,
    build_swapped_profile,
    fail_on_notice,
    read_pixels,
    save_image,
)

# An exception in a callback from C is only printed by Python; pytest turns it into a warning.
pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("no_output"),
]


@pytest.mark.parametrize(
    "content", [b"hello, world", b"GIF89a" + b"\0" * 50, b"BM" + b"\1" * 60, b"RIFF\1\0\0\0WAVEfmt "]
)
def test_other_kinds_are_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match="a.png is not a PNG, JPEG, WebP or TIFF"):
        inspect_source(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"\xff\xd8\xff", b"II*\0" + b"\0" * 20, b"RIFF\0\0\0\0WEBP"])
def test_a_header_without_content_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match="a (is|cannot)"):
        inspect_source(tmp_path / "a")


def test_missing_files_and_folders_have_different_errors(tmp_path):
    for missing in (tmp_path / "missing.png", tmp_path / "missing" / "a.png"):
        with pytest.raises(InputNotFound) as caught:
            inspect_source(missing)
        assert caught.value.exit_code == 66
    with pytest.raises(DataError, match="folder"):
        inspect_source(tmp_path)


OTHER_SAMPLES = [(dtype, {}) for dtype in ("f4", "f2", "u4", "i1", "i2")] + [("u2", {"bitspersample": 12})]
OTHER_COLOURS = [
    (f"u{bits // 8}", {"photometric": name}) for bits, name in [(8, "ycbcr"), (8, "icclab"), (16, "cielab")]
]
OTHER_CODES = [("u1", {"compression": name}) for name in ("zstd", "jpegxl")]
HUGE_TILES = [("u1", {"compression": "deflate", "tile": (6000, 6000)})]


@pytest.mark.parametrize(("dtype", "options"), OTHER_SAMPLES + OTHER_COLOURS + OTHER_CODES + HUGE_TILES, ids=str)
def test_a_tiff_of_another_kind_is_refused(tmp_path, dtype, options):
    tifffile.imwrite(tmp_path / "a", np.ones((40, 40, 3), dtype), **({"photometric": "rgb"} | options))
    with pytest.raises(DataError, match="a (has|cannot)") as caught:
        inspect_source(tmp_path / "a")
    assert caught.value.hint


THUMBNAIL, SENSOR = PIXELS[::2, ::2], np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)
BAYER = [(33421, 3, 2, (2, 2), True), (33422, 1, 4, b"\0\1\1\2", True)]
DNG_VERSION = [(50706, 1, 4, b"\1\4\0\0", True)]
EACH_FORM = pytest.mark.parametrize("form", [{}, {"bigtiff": True}, {"byteorder": ">"}], ids=str)


def write_pages(path, pages, form):
    """Write TIFF pages, each `(pixels, options)`; the pages after one with `subifds` are its SubIFDs."""
    with tifffile.TiffWriter(path, **form) as file:
        for pixels, options in pages:
            file.write(pixels, **({"photometric": "rgb", "metadata": None} | options))
    return path


def set_tag(path, code, value):
    """Overwrite the value of a tag of the first page."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags[code].overwrite(value)
    return path


SENSOR_PAGE = (SENSOR, {"photometric": 32803, "extratags": BAYER})
RAW = {
    "dng": [(THUMBNAIL, {"subfiletype": 1, "subifds": 1, "extratags": DNG_VERSION}), SENSOR_PAGE],
    "linear dng": [(PIXELS, {"photometric": 34892, "extratags": DNG_VERSION})],
    "dng with a full-size preview": [(PIXELS, {"extratags": DNG_VERSION})],
    "nef": [(THUMBNAIL, {"subfiletype": 1, "subifds": 2}), (PIXELS, {"subfiletype": 1}), SENSOR_PAGE],
    "thumbnail without subfiletype": [(THUMBNAIL, {"subifds": 1}), SENSOR_PAGE],
    "sensor first": [SENSOR_PAGE],
    "sensor as second page": [(THUMBNAIL, {}), SENSOR_PAGE],
}


@EACH_FORM
@pytest.mark.parametrize("pages", RAW.values(), ids=RAW)
def test_a_camera_raw_file_is_refused(tmp_path, pages, form):
    path = write_pages(tmp_path / "a.tif", pages, form)
    with pytest.raises(DataError, match="a.tif is a camera raw file") as caught:
        inspect_source(path)
    assert (caught.value.exit_code, caught.value.hint) == (65, "Develop it to TIFF, PNG or JPEG first.")


def test_a_cr2_is_detected_by_its_magic(tmp_path):
    """The first page of a CR2 is a small old-style JPEG, and the directory of the sensor data has no CR2 tag."""
    tags = {256: 96, 257: 64, 258: 8, 259: 6, 262: 6, 273: 200, 277: 3, 278: 64, 279: 100}
    entries = b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in tags.items())
    header = b"II*\0\x10\0\0\0CR\2\0\0\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a").write_bytes(header.ljust(300, b"\0"))
    with pytest.raises(DataError, match="a is a camera raw file"):
        inspect_source(tmp_path / "a")


@pytest.mark.parametrize(
    "magic", [b"IIRO\x08\0\0\0", b"IIRS\x08\0\0\0", b"IIU\0\x18\0\0\0", b"FUJIFILMCCD-RAW ", b"\0\0\0\x18ftypcrx "]
)
def test_raw_files_with_other_magic_bytes_are_refused(tmp_path, magic):
    """ORF (two variants), RW2, RAF and CR3."""
    (tmp_path / "a").write_bytes(magic.ljust(500, b"\1"))
    with pytest.raises(DataError, match="a is not a PNG, JPEG, WebP or TIFF"):
        inspect_source(tmp_path / "a")


@EACH_FORM
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (1, "a reduced-resolution image"),
        (3, "a reduced-resolution image"),
        (0x10001, "a reduced-resolution image"),
        (4, "a mask"),
        (6, "a mask"),
        (8, "a part of an image"),
        (16, "a part of an image"),
    ],
)
def test_a_first_page_that_is_not_the_image_is_refused(tmp_path, kind, content, form):
    path = write_pages(tmp_path / "a", [(THUMBNAIL, {"subfiletype": 1}), (PIXELS, {})], form)
    with pytest.raises(DataError, match=f"a has {content}.* as its first page") as caught:
        inspect_source(set_tag(path, 254, kind))
    assert "first page" in caught.value.hint


def test_the_subfile_type_of_tiff_5_is_checked(tmp_path):
    for kind in (1, 3):
        path = write_pages(tmp_path / "a", [(PIXELS, {"extratags": [(255, 3, 1, kind, True)]})], {})
        assert inspect_source(path).width_px == WIDTH
    with pytest.raises(DataError, match="a has a reduced-resolution image as its first page"):
        inspect_source(set_tag(path, 255, 2))


def test_a_first_page_with_a_larger_subifd_is_a_thumbnail(tmp_path):
    path = write_pages(tmp_path / "a", [(THUMBNAIL, {"subifds": 1}), (PIXELS, {})], {})
    with pytest.raises(DataError, match="a has a reduced-resolution image as its first page"):
        inspect_source(path)


LEVELS = [(PIXELS[:: 2**level, :: 2**level], {"subfiletype": 1}) for level in (1, 2)]
MULTI_PAGE = {
    "pyramid": [(PIXELS, {"subifds": 2, "tile": (32, 32)}), *LEVELS],
    "pyramid of pages": [(PIXELS, {"subfiletype": 0}), *LEVELS],
    "one of several pages": [(PIXELS, {"subfiletype": 2}), (np.tile(PIXELS, (2, 2, 1)), {"subfiletype": 2})],
    "mask as second page": [(PIXELS, {}), (PIXELS[..., 0] > 99, {"photometric": "mask", "subfiletype": 4})],
}


@EACH_FORM
@pytest.mark.parametrize("pages", MULTI_PAGE.values(), ids=MULTI_PAGE)
def test_pages_after_the_image_are_ignored(tmp_path, pages, form):
    np.testing.assert_allclose(read_pixels(write_pages(tmp_path / "a", pages, form)), PIXELS, atol=1e-4)


@pytest.mark.parametrize("offset", [0x7FFFFFF0, 0, 8, 9])
def test_a_damaged_pyramid_is_read_if_its_first_page_is_complete(tmp_path, offset):
    path = write_pages(tmp_path / "a", [(PIXELS, {"subifds": 2}), *LEVELS], {})
    np.testing.assert_allclose(read_pixels(set_tag(path, 330, (offset, offset))), PIXELS, atol=1e-4)


def test_old_style_jpeg_in_a_tiff_is_not_a_blank_image(tmp_path):
    path = write_pages(tmp_path / "a", [(PIXELS, {"compression": "jpeg"})], {})
    assert inspect_source(path).width_px == WIDTH
    with pytest.raises(DataError, match="a .*old-style JPEG") as caught:
        inspect_source(set_tag(path, 259, 6))
    assert caught.value.hint


def test_more_channels_are_refused(tmp_path):
    samples = np.ones((40, 40, 6), np.uint8)
    tifffile.imwrite(tmp_path / "a", samples, photometric="rgb", extrasamples=["unspecified"] * 3)
    with pytest.raises(DataError, match="6 channels"):
        inspect_source(tmp_path / "a")


def crc(chunk):
    return struct.pack(">I", zlib.crc32(chunk))


def png_header(width_px, height_px, interlaced=0):
    header = b"IHDR" + struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, interlaced)
    chunks = [header, b"IDAT\x78\x01"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(chunk) - 4) + chunk + crc(chunk) for chunk in chunks)


def test_sides_are_limited_to_a_million_px(tmp_path):
    (tmp_path / "a").write_bytes(png_header(1_000_000, 900_000))
    assert inspect_source(tmp_path / "a").width_px == 1_000_000
    for size in ((1_000_001, 1), (1, 1_000_001), (2**31 - 1, 2**31 - 1), (0, 5)):
        (tmp_path / "a").write_bytes(png_header(*size))
        with pytest.raises(DataError):
            inspect_source(tmp_path / "a")


def test_an_interlaced_png_is_limited_in_size(tmp_path):
    (tmp_path / "a").write_bytes(png_header(16384, 16384, interlaced=1))
    assert inspect_source(tmp_path / "a").held_bytes == 3 * 16384**2
    (tmp_path / "a").write_bytes(png_header(100_000, 100_000, interlaced=1))
    with pytest.raises(DataError, match="a requires 28610 MiB at once"):
        inspect_source(tmp_path / "a")


def test_a_large_header_without_data_takes_no_memory(tmp_path):
    import psutil

    (tmp_path / "a").write_bytes(png_header(65_000, 1_000_000))
    before = psutil.Process().memory_info().rss
    with pytest.raises(DataError, match="cannot be decoded"):
        read_pixels(tmp_path / "a")
    assert psutil.Process().memory_info().rss - before < 300 << 20


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_refused(tmp_path, format):
    path = save_image(tmp_path / "a", make_image(300, 600), format, **SAVE_OPTIONS[format])
    content = path.read_bytes()
    for length in np.linspace(4, len(content) * 0.98, 40).astype(int):
        path.write_bytes(content[:length])
        with pytest.raises(DataError) as caught:
            read_pixels(path)
        assert str(path) in caught.value.message and "\n" not in str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_are_read_or_refused(tmp_path, format):
    exif, options = Image.Exif(), SAVE_OPTIONS[format] | {"icc_profile": build_swapped_profile()}
    exif[0x0112] = 6
    opaque = save_image(tmp_path / "a", TRANSPARENT[..., :3], format, exif=exif, **options).read_bytes()
    other = {"progressive": True} if format == "jpeg" else {}
    pixels = TRANSPARENT[..., :3] if format == "jpeg" else TRANSPARENT
    path = save_image(tmp_path / "a", pixels, format, **options, **other)
    contents, random, refused = [opaque, path.read_bytes()], np.random.default_rng(0), 0
    for number in range(100):
        damaged = bytearray(contents[number % 2])
        reach = len(damaged) if number % 4 < 2 else 1500  # mostly headers
        for at in random.integers(0, reach, random.integers(1, 8)):
            damaged[at] = random.integers(0, 256)
        path.write_bytes(damaged[: random.integers(0, len(damaged))] if number % 10 == 0 else damaged)
        try:
            read_pixels(path, (0, 0, 0), lambda text: None)
        except LinfusionError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
    assert refused > 5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("place", [0.5, 0.8])
def test_missing_pixels_do_not_become_grey_rows(tmp_path, format, place):
    path = save_image(tmp_path / "a", make_image(300, 600), format, **SAVE_OPTIONS[format])
    content = path.read_bytes()
    path.write_bytes(content[: int(place * len(content))] + content[int(place * len(content)) + 3000 :])
    with pytest.raises(DataError, match="cannot be decoded|is damaged|is truncated"):
        read_pixels(path)


def test_a_warning_with_invalid_utf8_is_not_printed(tmp_path):
    path = save_image(tmp_path / "a", PIXELS, "png", icc_profile=LAB_PROFILE)
    content = path.read_bytes()
    chunk = content[content.index(b"iCCP") :][: int.from_bytes(content[content.index(b"iCCP") - 4 :][:4]) + 4]
    renamed = chunk.replace(b"ICC Profile", b"ICC \xbf\xd6ofile")
    path.write_bytes(content.replace(chunk + crc(chunk), renamed + crc(renamed)))
    notices = []
    np.testing.assert_allclose(read_pixels(path, notify=notices.append), PIXELS, atol=1e-4)
    assert len(notices) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_has_changed_is_refused(tmp_path, format):
    result = inspect_source(save_image(tmp_path / "a", PIXELS, format, **SAVE_OPTIONS[format]))
    save_image(tmp_path / "a", PIXELS[:-1], format, **SAVE_OPTIONS[format])
    with pytest.raises(DataError, match="was modified"):
        read_source_rows(result, None, fail_on_notice)
