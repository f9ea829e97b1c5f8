import io
import struct
import threading
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps

from linfusion_cli.errors import DataError, InputMissing, LinfusionError
from linfusion_cli.images import open_sink, srgb_profile
from linfusion_cli.images.source import inspect_source, oriented, source_rows
from tests.images.conftest import picture

WIDTH, HEIGHT = 90, 70
SAVING = {
    "png": {},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"lossless": True, "exact": True},
    "tiff": {"compression": "tiff_lzw"},
}
FORMATS = list(SAVING)
LOSSLESS = ["png", "webp", "tiff"]


def unheard(text):
    raise AssertionError(text)


def read(path, background=None, notify=unheard):
    """The whole stored picture, in numbers of 8 bits."""
    return np.concatenate(list(source_rows(inspect_source(path), background, notify))) * 255


def saved(path, pixels, format, **options):
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, format, **options)
    return path


def swapped_profile():
    """The profile of an sRGB whose red is green and whose green is red."""
    profile = bytearray(srgb_profile())
    entries = range(132, 132 + 12 * int.from_bytes(profile[128:132]), 12)
    at = {bytes(profile[entry : entry + 4]): entry for entry in entries}
    profile[at[b"rXYZ"] : at[b"rXYZ"] + 4], profile[at[b"gXYZ"] : at[b"gXYZ"] + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


@pytest.fixture
def pixels():
    return picture(WIDTH, HEIGHT)


@pytest.fixture(autouse=True)
def nothing_printed(capfd):
    yield
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("format", FORMATS)
def test_eight_bits_are_read_as_pillow_reads_them(tmp_path, pixels, format):
    path = saved(tmp_path / "a", pixels, format, **SAVING[format])
    found = inspect_source(path)
    assert (found.format, found.width_px, found.height_px, found.bits) == (format, WIDTH, HEIGHT, 8)
    assert (found.has_alpha, found.orientation, found.stored_px) == (False, 1, (WIDTH, HEIGHT))
    expected = np.asarray(Image.open(path)).astype(float)
    np.testing.assert_allclose(read(path), expected, atol=2 if format == "jpeg" else 1e-4)


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_sixteen_bits_are_read_exactly(tmp_path, info, format):
    pixels = np.arange(65536, dtype=np.uint16).repeat(3).reshape(512, 128, 3)
    sink = open_sink(tmp_path / "a", format, (128, 512), 16, info)
    sink.write(pixels)
    sink.close()
    found = inspect_source(tmp_path / "a")
    assert found.bits == 16
    rows = np.concatenate(list(source_rows(found, None, unheard)))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(np.rint(rows * 65535), pixels)
    np.testing.assert_allclose(rows, pixels / 65535, atol=1e-7)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(
    "stored", [{}, {"tile": (32, 48)}, {"rowsperstrip": 7, "compression": "lzw"}, {"planarconfig": "separate"}], ids=str
)
def test_a_tiff_of_any_layout_is_read(tmp_path, stored, byteorder):
    pixels = picture(WIDTH, HEIGHT, 16)
    planes = pixels.transpose(2, 0, 1) if "planarconfig" in stored else pixels
    tifffile.imwrite(tmp_path / "a", planes, photometric="rgb", byteorder=byteorder, **stored)
    np.testing.assert_allclose(read(tmp_path / "a") * 257, pixels, atol=0.01)


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}])
def test_a_jpeg_of_any_layout_is_read(tmp_path, pixels, options):
    path = saved(tmp_path / "a", pixels, "jpeg", quality=95, **options)
    assert (inspect_source(path).held_bytes > 0) == ("progressive" in options)
    assert np.abs(read(path) - np.asarray(Image.open(path))).max() <= 2


def test_an_interlaced_png_is_read(tmp_path, pixels):
    pyvips = pytest.importorskip("pyvips")
    pyvips.Image.new_from_array(pixels, interpretation="srgb").pngsave(str(tmp_path / "a"), interlace=True)
    assert inspect_source(tmp_path / "a").held_bytes == pixels.nbytes
    np.testing.assert_allclose(read(tmp_path / "a"), pixels, atol=1e-4)


def test_rows_come_once_in_bands_of_256(tmp_path, pixels):
    path = saved(tmp_path / "a", np.tile(pixels, (9, 1, 1)), "png")
    bands = list(source_rows(inspect_source(path), None, unheard))
    assert [len(band) for band in bands] == [256, 256, 118]
    np.testing.assert_allclose(np.concatenate(bands) * 255, np.asarray(Image.open(path)), atol=1e-4)


def test_bands_of_a_very_wide_picture_are_lower(tmp_path, pixels, monkeypatch):
    monkeypatch.setattr("linfusion_cli.images.source.BAND_PX", 30 * WIDTH)
    monkeypatch.setattr("linfusion_cli.images.source.FETCH_PX", 7 * WIDTH)
    bands = list(source_rows(inspect_source(saved(tmp_path / "a", pixels, "png")), None, unheard))
    assert [len(band) for band in bands] == [30, 30, 10]
    np.testing.assert_allclose(np.concatenate(bands) * 255, pixels, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_seen_as_pillow_turns_it(tmp_path, pixels, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a", pixels, format, exif=exif, **SAVING[format])
    found = inspect_source(path)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert (found.height_px, found.width_px) == expected.shape[:2]
    assert (found.orientation, found.stored_px) == (orientation, (WIDTH, HEIGHT))
    stored = read(path)
    see = oriented(lambda top, bottom, left, right: stored[top:bottom, left:right].copy(), found)
    whole = see(0, found.height_px, 0, found.width_px)
    np.testing.assert_allclose(whole, expected, atol=2 if format == "jpeg" else 1e-4)
    for top, bottom, left, right in [(0, 1, 0, 1), (3, 40, 11, 12), (20, 70, 0, 65)]:
        region = see(top, bottom, left, right)
        assert region.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(region, whole[top:bottom, left:right])


@pytest.mark.parametrize("format", ["png", "jpeg", "tiff"])
def test_grey_becomes_rgb(tmp_path, pixels, format):
    path = saved(tmp_path / "a", pixels[..., 0], format, **SAVING[format])
    expected = np.asarray(Image.open(path).convert("RGB")).astype(float)
    np.testing.assert_allclose(read(path), expected, atol=2 if format == "jpeg" else 1e-4)


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_grey_of_sixteen_bits_becomes_rgb(tmp_path, format):
    grey = picture(WIDTH, HEIGHT, 16)[..., 0]
    path = saved(tmp_path / "a", grey, format)
    assert inspect_source(path).bits == 16
    np.testing.assert_allclose(read(path) * 257, grey[..., None].repeat(3, 2), atol=0.01)


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_one_bit_becomes_black_and_white(tmp_path, pixels, format):
    path = saved(tmp_path / "a", Image.fromarray(pixels).convert("1"), format)
    assert inspect_source(path).bits == 8
    np.testing.assert_array_equal(read(path), np.asarray(Image.open(path).convert("RGB")))


def test_white_may_be_nought(tmp_path, pixels):
    tifffile.imwrite(tmp_path / "a", pixels[..., 0], photometric="miniswhite")
    np.testing.assert_allclose(read(tmp_path / "a")[..., 0], 255 - pixels[..., 0].astype(float), atol=1e-4)


@pytest.mark.parametrize("format", ["png", "tiff"])
@pytest.mark.parametrize("colours", [256, 13, 2])
def test_a_palette_becomes_rgb(tmp_path, pixels, format, colours):
    path = saved(tmp_path / "a", Image.fromarray(pixels).quantize(colours), format)
    np.testing.assert_array_equal(read(path), np.asarray(Image.open(path).convert("RGB")))


def test_a_palette_may_be_transparent(tmp_path, pixels):
    path = saved(tmp_path / "a", Image.fromarray(pixels).quantize(16), "png", transparency=bytes([0, 128] + 14 * [255]))
    assert inspect_source(path).has_alpha
    seen = flattened(np.asarray(Image.open(path).convert("RGBA")), (255, 0, 10))
    np.testing.assert_allclose(read(path, (255, 0, 10)), seen, atol=1e-3)


def flattened(rgba, background):
    alpha = rgba[..., 3:] / np.iinfo(rgba.dtype).max
    return rgba[..., :3] * alpha + np.array(background) * (1 - alpha)


@pytest.fixture
def transparent(pixels):
    return np.dstack([pixels, np.linspace(0, 255, pixels[..., 0].size).reshape(HEIGHT, WIDTH).astype(np.uint8)])


@pytest.mark.parametrize("format", LOSSLESS)
def test_an_alpha_channel_is_refused_without_a_background(tmp_path, transparent, format):
    found = inspect_source(saved(tmp_path / "a", transparent, format, **SAVING[format]))
    assert found.has_alpha
    with pytest.raises(DataError, match="a has transparency.*--background white") as caught:
        source_rows(found, None, unheard)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("format", LOSSLESS)
def test_an_alpha_channel_lets_the_background_through(tmp_path, transparent, format):
    path = saved(tmp_path / "a", transparent, format, **SAVING[format])
    seen = flattened(np.asarray(Image.open(path)), (255, 128, 0))
    np.testing.assert_allclose(read(path, (255, 128, 0)), seen, atol=1e-3)


def test_sixteen_bits_may_be_transparent(tmp_path, transparent):
    wide = transparent.astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "a", wide, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_allclose(read(tmp_path / "a", (9, 8, 7)), flattened(transparent, (9, 8, 7)), atol=1e-3)


def test_colours_multiplied_by_alpha_are_divided_again(tmp_path, transparent):
    multiplied = transparent.copy()
    multiplied[..., :3] = np.rint(transparent[..., :3] * (transparent[..., 3:] / 255))
    tifffile.imwrite(tmp_path / "a", multiplied, photometric="rgb", extrasamples=["assocalpha"])
    seen = multiplied[..., :3] + 200 * (1 - multiplied[..., 3:] / 255.0)
    assert np.abs(read(tmp_path / "a", (200, 200, 200)) - seen).max() < 1.01


def test_grey_may_be_transparent(tmp_path, transparent):
    path = saved(tmp_path / "a", Image.fromarray(transparent).convert("LA"), "png")
    seen = flattened(np.asarray(Image.open(path).convert("RGBA")), (1, 2, 3))
    np.testing.assert_allclose(read(path, (1, 2, 3)), seen, atol=1e-3)


def test_without_alpha_the_background_is_ignored(tmp_path, pixels):
    path = saved(tmp_path / "a", pixels, "png")
    np.testing.assert_array_equal(read(path, (255, 0, 0)), read(path))


@pytest.mark.parametrize("format", ["jpeg", "tiff"])
def test_cmyk_becomes_srgb(tmp_path, format):
    inks = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    inks[:, 30:, 1], inks[:, 60:, 3] = 255, 255
    path = saved(tmp_path / "a", Image.fromarray(inks, "CMYK"), format, **SAVING[format])
    found = read(path)
    white, magenta, dark = found[35, 10], found[35, 45], found[35, 75]
    assert white.min() > 250 and dark.max() < 60
    assert magenta[0] > 200 and magenta[1] < 60 and 80 < magenta[2] < 180


@pytest.mark.parametrize("format", FORMATS)
def test_a_profile_is_applied(tmp_path, pixels, format):
    path = saved(tmp_path / "a", pixels, format, icc_profile=swapped_profile(), **SAVING[format])
    theirs = ImageCms.ImageCmsProfile(io.BytesIO(swapped_profile()))
    srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
    expected = np.asarray(ImageCms.profileToProfile(Image.open(path), theirs, srgb, intent)).astype(float)
    assert np.abs(expected - pixels).max() > 40
    np.testing.assert_allclose(read(path), expected, atol=4 if format == "jpeg" else 1)


def test_a_profile_is_applied_to_all_of_sixteen_bits(tmp_path):
    pixels = picture(WIDTH, HEIGHT, 16)
    profile = [(34675, "B", len(swapped_profile()), swapped_profile(), True)]
    tifffile.imwrite(tmp_path / "a", pixels, photometric="rgb", extratags=profile)
    found = read(tmp_path / "a") * 257
    assert np.abs(found - pixels[..., [1, 0, 2]]).max() < 65  # red and green are swapped, nothing else
    assert len(np.unique(found.round())) > 5000


def test_a_profile_leaves_alpha_alone(tmp_path, transparent):
    path = saved(tmp_path / "a", transparent, "png", icc_profile=swapped_profile())
    seen = flattened(transparent[..., [1, 0, 2, 3]], (0, 100, 0))
    np.testing.assert_allclose(read(path, (0, 100, 0)), seen, atol=1.01)


@pytest.mark.parametrize(
    "profile", [srgb_profile(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_a_profile_of_srgb_changes_nothing(tmp_path, pixels, profile):
    path = saved(tmp_path / "a", pixels, "png", icc_profile=profile)
    np.testing.assert_allclose(read(path), pixels, atol=1e-4)


LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
UNUSABLE = {"rubbish": b"rubbish" * 99, "short": b"abc", "cut": srgb_profile()[:300], "lab": LAB}


@pytest.mark.parametrize("profile", UNUSABLE)
@pytest.mark.parametrize("format", FORMATS)
def test_an_unusable_profile_is_said_and_left_out(tmp_path, pixels, format, profile):
    path, said = saved(tmp_path / "a", pixels, format, icc_profile=UNUSABLE[profile], **SAVING[format]), []
    expected = np.asarray(Image.open(path)).astype(float)
    np.testing.assert_allclose(read(path, notify=said.append), expected, atol=2 if format == "jpeg" else 1e-4)
    assert said == [f"The colour profile in {path} cannot be used, so its colours are taken as sRGB."]


@pytest.mark.parametrize("format", ["png", "jpeg", "tiff"])
def test_a_profile_of_other_channels_is_said_and_left_out(tmp_path, pixels, format):
    path, said = saved(tmp_path / "a", pixels[..., 0], format, icc_profile=srgb_profile(), **SAVING[format]), []
    expected = np.asarray(Image.open(path).convert("RGB")).astype(float)
    np.testing.assert_allclose(read(path, notify=said.append), expected, atol=2 if format == "jpeg" else 1e-4)
    assert len(said) == 1


def test_cmyk_with_a_profile_of_rgb_is_taken_as_common_cmyk(tmp_path):
    inks, said = Image.new("CMYK", (20, 20), (0, 255, 0, 0)), []
    with_profile = saved(tmp_path / "a", inks, "tiff", icc_profile=srgb_profile())
    without = saved(tmp_path / "b", inks, "tiff")
    np.testing.assert_array_equal(read(with_profile, notify=said.append), read(without))
    assert "common CMYK" in said[0]


def test_of_several_pages_the_first_is_read(tmp_path, pixels):
    for format, frames in (("tiff", {}), ("webp", {"lossless": True, "duration": 100})):
        more = [Image.fromarray(255 - pixels)]
        path = saved(tmp_path / format, pixels, format, save_all=True, append_images=more, **frames)
        found = inspect_source(path)
        assert (found.width_px, found.height_px) == (WIDTH, HEIGHT)
        background = (0, 0, 0) if found.has_alpha else None
        np.testing.assert_allclose(read(path, background), pixels, atol=1e-3)


def test_the_name_says_nothing(tmp_path, pixels):
    path = saved(tmp_path / "a.png", pixels, "tiff")
    assert inspect_source(path).format == "tiff"
    np.testing.assert_allclose(read(path), pixels, atol=1e-4)


def test_a_name_may_be_anything(tmp_path, pixels):
    path = saved(tmp_path / "a[page=1]\udcff ü.jpg", pixels, "jpeg")
    assert read(path).shape == pixels.shape


@pytest.mark.parametrize(
    "content", [b"hello, world", b"GIF89a" + b"\0" * 50, b"BM" + b"\1" * 60, b"RIFF\1\0\0\0WAVEfmt "]
)
def test_other_kinds_are_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match="a.png is not a PNG, JPEG, WebP or TIFF picture"):
        inspect_source(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"\xff\xd8\xff", b"II*\0" + b"\0" * 20, b"RIFF\0\0\0\0WEBP"])
def test_what_is_hardly_a_file_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match="a (is|cannot)"):
        inspect_source(tmp_path / "a")


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    for missing in (tmp_path / "missing.png", tmp_path / "missing" / "a.png"):
        with pytest.raises(InputMissing) as caught:
            inspect_source(missing)
        assert caught.value.exit_code == 66
    with pytest.raises(DataError, match="folder"):
        inspect_source(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("f4", {}),
        ("f2", {}),
        ("u4", {}),
        ("i1", {}),
        ("i2", {}),
        ("u2", {"bitspersample": 12}),
        ("u1", {"photometric": "ycbcr"}),
        ("u1", {"photometric": "icclab"}),
        ("u2", {"photometric": "cielab"}),
        ("u1", {"compression": "zstd"}),
        ("u1", {"compression": "jpegxl"}),
        ("u1", {"compression": "deflate", "tile": (6000, 6000)}),
    ],
    ids=str,
)
def test_a_tiff_of_other_samples_is_refused(tmp_path, dtype, options):
    tifffile.imwrite(tmp_path / "a", np.ones((40, 40, 3), dtype), **({"photometric": "rgb"} | options))
    with pytest.raises(DataError, match="a (has|cannot)") as caught:
        inspect_source(tmp_path / "a")
    assert caught.value.way_out


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


def test_sides_end_at_a_million(tmp_path):
    (tmp_path / "a").write_bytes(png_header(1_000_000, 900_000))
    assert inspect_source(tmp_path / "a").width_px == 1_000_000
    for size in ((1_000_001, 1), (1, 1_000_001), (2**31 - 1, 2**31 - 1), (0, 5)):
        (tmp_path / "a").write_bytes(png_header(*size))
        with pytest.raises(DataError):
            inspect_source(tmp_path / "a")


def test_what_must_be_decoded_whole_may_not_be_huge(tmp_path):
    (tmp_path / "a").write_bytes(png_header(16384, 16384, interlaced=1))
    assert inspect_source(tmp_path / "a").held_bytes == 3 * 16384**2
    (tmp_path / "a").write_bytes(png_header(100_000, 100_000, interlaced=1))
    with pytest.raises(DataError, match="28610 MiB of it must be decoded at once"):
        inspect_source(tmp_path / "a")


def test_a_large_header_with_nothing_behind_takes_no_memory(tmp_path):
    import psutil

    (tmp_path / "a").write_bytes(png_header(65_000, 1_000_000))
    before = psutil.Process().memory_info().rss
    with pytest.raises(DataError, match="cannot be decoded"):
        read(tmp_path / "a")
    assert psutil.Process().memory_info().rss - before < 300 << 20


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_cut_off_is_refused(tmp_path, format):
    path = saved(tmp_path / "a", picture(300, 600), format, **SAVING[format])
    content = path.read_bytes()
    for length in np.linspace(4, len(content) * 0.98, 40).astype(int):
        path.write_bytes(content[:length])
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(path) in caught.value.message and "\n" not in str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_are_read_or_refused(tmp_path, transparent, format):
    exif, options = Image.Exif(), SAVING[format] | {"icc_profile": swapped_profile()}
    exif[0x0112] = 6
    opaque = saved(tmp_path / "a", transparent[..., :3], format, exif=exif, **options).read_bytes()
    other = {"progressive": True} if format == "jpeg" else {}
    pixels = transparent[..., :3] if format == "jpeg" else transparent
    path = saved(tmp_path / "a", pixels, format, **options, **other)
    contents, random, refused = [opaque, path.read_bytes()], np.random.default_rng(0), 0
    for number in range(100):
        damaged = bytearray(contents[number % 2])
        reach = len(damaged) if number % 4 < 2 else 1500  # headers are where it hurts
        for at in random.integers(0, reach, random.integers(1, 8)):
            damaged[at] = random.integers(0, 256)
        path.write_bytes(damaged[: random.integers(0, len(damaged))] if number % 10 == 0 else damaged)
        try:
            read(path, (0, 0, 0), lambda text: None)
        except LinfusionError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
    assert refused > 5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("place", [0.5, 0.8])
def test_pixels_that_are_missing_are_no_grey_rows(tmp_path, format, place):
    path = saved(tmp_path / "a", picture(300, 600), format, **SAVING[format])
    content = path.read_bytes()
    path.write_bytes(content[: int(place * len(content))] + content[int(place * len(content)) + 3000 :])
    with pytest.raises(DataError, match="cannot be decoded|is damaged|is cut off"):
        read(path)


def test_a_warning_that_quotes_the_file_is_not_printed(tmp_path, pixels):
    path = saved(tmp_path / "a", pixels, "png", icc_profile=LAB)
    content = path.read_bytes()
    chunk = content[content.index(b"iCCP") :][: int.from_bytes(content[content.index(b"iCCP") - 4 :][:4]) + 4]
    renamed = chunk.replace(b"ICC Profile", b"ICC \xbf\xd6ofile")
    path.write_bytes(content.replace(chunk + crc(chunk), renamed + crc(renamed)))
    said = []
    np.testing.assert_allclose(read(path, notify=said.append), pixels, atol=1e-4)
    assert len(said) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_has_changed_is_refused(tmp_path, pixels, format):
    found = inspect_source(saved(tmp_path / "a", pixels, format, **SAVING[format]))
    saved(tmp_path / "a", pixels[:-1], format, **SAVING[format])
    with pytest.raises(DataError, match="has changed"):
        source_rows(found, None, unheard)


@pytest.mark.parametrize("format", FORMATS)
def test_a_reader_that_stops_leaves_no_file_open(tmp_path, format):
    import psutil

    path = saved(tmp_path / "a", picture(600, 900), format, **SAVING[format])
    inspect_source(path)
    before = psutil.Process().num_fds()
    for _ in range(5):
        rows = source_rows(inspect_source(path), None, unheard)
        next(rows)
        rows.close()
    for thread in [thread for thread in threading.enumerate() if thread.name == "feed"]:
        thread.join(10)
    assert psutil.Process().num_fds() <= before
