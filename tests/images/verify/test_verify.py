"""Unmodified files pass verification; a file with a flipped bit in its pixel data never does."""

import dataclasses
import hashlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from linfusion_cli.core.errors import DataError, InputNotFound
from linfusion_cli.images import ImageInfo, PreviewSink, open_sink, read_info, remove_prompt_metadata
from linfusion_cli.images.verify.verify import verify_image
from linfusion_cli.images.write import ifd, tiff
from linfusion_cli.images.write.jpeg import iter_segments
from tests.images.conftest import make_image

pytestmark = pytest.mark.usefixtures("no_output")

KINDS = [
    *(("tiff", compression, bits) for compression in ("deflate", "zstd", "lzw", "none") for bits in (8, 16)),
    ("tiff", "jpeg", 8),
    ("png", None, 8),
    ("png", None, 16),
    ("jpeg", None, 8),
]
EIGHT_BITS = [(format, compression) for format, compression, bits in KINDS if bits == 8]
FLIPS = 300
CHECKSUM_LIKE_PROMPT = f'{{"file_sha256": "{"0" * 64}", "prompt": "'


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiff, "TILE_PX", 32)


def write_image(path, format, compression, bits, info, size=(60, 45)):
    sink = open_sink(path, format, size, bits, info, compression, overwrite=True, threads=2)
    sink.write(make_image(*size, bits))
    sink.close()
    return path


def compute_expected_checksum(path):
    """Compute the checksum as documented, independently of the code under test."""
    content, result = bytearray(path.read_bytes()), read_info(path)
    content[result.file_sha256_at : result.file_sha256_at + 64] = b"0" * 64
    if result.format == "tiff":
        content = content[16:] + content[:16]
    if result.format == "png":
        begin = content.index(b"iTXtlinfusion\0")
        end = begin + 4 + int.from_bytes(content[begin - 4 : begin])
        content[end : end + 4] = zlib.crc32(content[begin:end]).to_bytes(4)
    return hashlib.sha256(content).hexdigest()


def find_pixel_data(path):
    """Return the first byte of the pixel data and the byte after the last one."""
    content, format = path.read_bytes(), read_info(path).format
    if format == "tiff":
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            return ifd.HEADER_BYTES, page.dataoffsets[-1] + page.databytecounts[-1]
    if format == "png":
        return content.index(b"IDAT") + 4, content.rindex(b"IDAT") - 8
    return [end for _, _, end in iter_segments(content)][-1], len(content) - 2


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 32), (65, 97)], ids=str)
@pytest.mark.parametrize(("format", "compression", "bits"), KINDS)
def test_written_files_are_verified(tmp_path, info, format, compression, bits, size):
    path = write_image(tmp_path / "a", format, compression, bits, info, size)
    result = verify_image(path)
    assert result == read_info(path)
    assert result.file_sha256 == compute_expected_checksum(path)
    assert result.request == info.request


@pytest.mark.parametrize("format", ["tiff", "png", "jpeg"])
@pytest.mark.parametrize("length", [0, 70_000])
def test_a_prompt_like_a_checksum_is_unchanged(tmp_path, info, format, length):
    prompt = CHECKSUM_LIKE_PROMPT + "é" * length  # longer than a JPEG segment
    info = dataclasses.replace(info, prompt=prompt, request={"prompt": prompt}, parameters=prompt)
    result = verify_image(write_image(tmp_path / "a", format, None, 8, info))
    assert result.request == {"prompt": prompt}
    assert set(result.file_sha256) <= set("0123456789abcdef") and result.file_sha256 != "0" * 64


@pytest.mark.parametrize("format", ["tiff", "png", "jpeg"])
def test_every_file_has_a_checksum(tmp_path, info, format):
    assert verify_image(write_image(tmp_path / "a", format, None, 8, remove_prompt_metadata(info))).file_sha256
    nothing = ImageInfo("s", 72.0, {}, "", "", "")
    result = verify_image(write_image(tmp_path / "a", format, None, 8, nothing))
    assert (result.request, len(result.file_sha256)) == ({}, 64)
    preview = PreviewSink(tmp_path / f"a.{format}", (60, 45), 16, info, max_side_px=20)
    preview.write(make_image(60, 45, 16))
    preview.close()
    assert verify_image(tmp_path / f"a.{format}").file_sha256


@pytest.mark.parametrize("size", [(1, 1), (40, 70)], ids=str)
def test_bigtiff(tmp_path, info, monkeypatch, size):
    monkeypatch.setattr(ifd, "CLASSIC_LIMIT", 20)
    path = write_image(tmp_path / "a", "tiff", None, 8, info, size)
    assert path.read_bytes()[2] == 43
    assert verify_image(path).file_sha256 == compute_expected_checksum(path)


@pytest.mark.parametrize(("format", "compression"), EIGHT_BITS)
def test_every_flipped_bit_of_the_image_is_detected(tmp_path, info, format, compression):
    path = write_image(tmp_path / "a", format, compression, 8, info)
    content, (begin, end) = path.read_bytes(), find_pixel_data(path)
    assert end - begin > len(content) // 6
    for bit in np.random.default_rng(1).integers(8 * begin, 8 * end, FLIPS):
        path.write_bytes(flip_bit(content, bit))
        with pytest.raises(DataError) as caught:
            verify_image(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("format", "compression"), [("tiff", "none"), ("png", None), ("jpeg", None)])
def test_flipped_bits_elsewhere_are_detected_or_remove_the_checksum(tmp_path, info, format, compression):
    path = write_image(tmp_path / "a", format, compression, 8, info)
    content, (begin, end), result = path.read_bytes(), find_pixel_data(path), read_info(path)
    bits = [bit for bit in range(8 * len(content)) if not 8 * begin <= bit < 8 * end]
    undetected = 0
    for bit in np.random.default_rng(1).choice(bits, FLIPS, replace=False):
        path.write_bytes(flip_bit(content, bit))
        try:
            assert verify_image(path).file_sha256 is None
            undetected += 1
        except DataError:
            pass
    assert undetected < FLIPS / 30
    for at in range(result.file_sha256_at, result.file_sha256_at + 64):
        path.write_bytes(flip_bit(content, 8 * at + 6))  # not a hex digit
        with pytest.raises(DataError):
            verify_image(path)


def flip_bit(content, bit):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return damaged


@pytest.mark.parametrize(("format", "compression"), EIGHT_BITS)
def test_every_truncation_is_detected(tmp_path, info, format, compression):
    path = write_image(tmp_path / "a", format, compression, 8, info)
    content = path.read_bytes()
    for length in np.linspace(0, len(content) - 1, 100).astype(int):
        path.write_bytes(content[:length])
        with pytest.raises(DataError):
            verify_image(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(DataError):
        verify_image(path)


def test_the_error_contains_the_tile(tmp_path, info):
    path = write_image(tmp_path / "a.tif", "tiff", "deflate", 8, info)
    with tifffile.TiffFile(path) as file:
        at = file.pages[0].dataoffsets[2] + 30
    path.write_bytes(flip_bit(path.read_bytes(), 8 * at))
    with pytest.raises(DataError, match=r"a.tif is damaged: tile 3 of 4 does not decode \(\S"):
        verify_image(path)


def test_the_error_contains_the_rows(tmp_path, info):
    path = write_image(tmp_path / "a.png", "png", None, 8, info)
    begin, end = find_pixel_data(path)
    path.write_bytes(flip_bit(path.read_bytes(), 4 * (begin + end)))
    with pytest.raises(DataError, match=r"a.png is damaged: (its data do not inflate|.* after|.* IDAT chunk)"):
        verify_image(path)
    path = write_image(tmp_path / "a.jpg", "jpeg", None, 8, info, (60, 500))
    content = path.read_bytes()
    begin, end = find_pixel_data(path)
    path.write_bytes(content[: (begin + end) // 2] + content[(begin + end) // 2 + 400 :])
    with pytest.raises(DataError, match="a.jpg cannot be decoded from row 1: Corrupt JPEG data"):
        verify_image(path)


def test_a_change_that_decodes_is_found_by_the_checksum(tmp_path, info):
    path = write_image(tmp_path / "a.tif", "tiff", "none", 8, info)
    path.write_bytes(flip_bit(path.read_bytes(), 8 * 1000))
    with pytest.raises(DataError, match="checksum of .*a.tif .*[0-9a-f]{64} instead of [0-9a-f]{64}"):
        verify_image(path)


@pytest.mark.parametrize(("format", "compression"), EIGHT_BITS)
def test_memory_does_not_grow_with_the_image(tmp_path, info, monkeypatch, format, compression):
    monkeypatch.setattr(tiff, "TILE_PX", 256)
    rows = make_image(2048, 256)
    for name, height_px in (("short", 1024), ("tall", 5120)):
        sink = open_sink(tmp_path / name, format, (2048, height_px), 8, info, compression)
        for _ in range(height_px // 256):
            sink.write(rows)
        sink.close()

    def peak(name):
        tracemalloc.start()
        verify_image(tmp_path / name)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak_bytes

    peak("short")  # imports
    assert peak("tall") <= 1.25 * peak("short") + 1e6


REWRITES = [("add_text", {}), ("add_text", {"zip": True}), ("add_itxt", {"zip": True})]


@pytest.mark.parametrize("rewrite", REWRITES, ids=str)
def test_a_modified_image_with_its_old_request_is_refused(tmp_path, rewrite):
    texts, (add, options) = PngImagePlugin.PngInfo(), rewrite
    getattr(texts, add)("linfusion", f'{{"file_sha256": "{"1a" * 32}", "seed": 1}}', **options)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=texts)
    assert read_info(tmp_path / "a.png").request == {"seed": 1}
    with pytest.raises(DataError, match="checksum of .*a.png"):
        verify_image(tmp_path / "a.png")


def test_a_missing_file(tmp_path):
    with pytest.raises(InputNotFound):
        verify_image(tmp_path / "missing.tif")


OTHERS = [
    *(("tiff", mode, {"compression": name}) for mode in ("RGB", "L", "CMYK") for name in ("raw", "tiff_lzw")),
    *(("tiff", "RGB", {"compression": name}) for name in ("tiff_adobe_deflate", "jpeg", "packbits")),
    *(("tiff", "1", {"compression": name}) for name in ("raw", "group4")),
    *(("png", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("jpeg", mode, {"progressive": True, "quality": 90}) for mode in ("L", "RGB", "CMYK")),
    ("jpeg", "RGB", {"restart_marker_rows": 1}),
]


@pytest.mark.parametrize(("format", "mode", "options"), OTHERS, ids=str)
def test_files_of_other_programs_are_decoded(tmp_path, format, mode, options):
    image = Image.fromarray(make_image(61, 170)).convert("RGB" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(make_image(61, 170, 16)[..., 0])
    image.save(tmp_path / "a", format, **options)
    result = verify_image(tmp_path / "a")
    assert (result.width_px, result.height_px, result.file_sha256, result.file_sha256_at) == (61, 170, None, None)
    assert result.request is None


LAYOUTS = [
    {"tile": (32, 32), "compression": "zlib"},
    {"tile": (32, 32), "planarconfig": "separate"},
    {"rowsperstrip": 7, "planarconfig": "separate", "compression": "zstd", "predictor": True},
    {"rowsperstrip": 7},
    {"rowsperstrip": 7, "compression": "lzw", "byteorder": ">"},
    {},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("bits", [8, 16])
def test_other_layouts_of_tiff(tmp_path, options, bits):
    pixels = make_image(61, 90, bits)
    pixels = np.moveaxis(pixels, -1, 0) if "planarconfig" in options else pixels
    tifffile.imwrite(tmp_path / "a", pixels, photometric="rgb", metadata=None, **options)
    assert verify_image(tmp_path / "a").file_sha256 is None
    with tifffile.TiffFile(tmp_path / "a", mode="r+") as file:
        tag = file.pages[0].tags[325 if "tile" in options else 279]
        tag.overwrite(np.maximum(np.asarray(tag.value) // 2, 1).tolist())
    with pytest.raises(DataError, match="(tile|strip) 1 of"):
        verify_image(tmp_path / "a")


def test_a_tile_too_large_to_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("linfusion_cli.images.verify.tiff.MAX_HELD_BYTES", 10 << 20)
    tifffile.imwrite(tmp_path / "a", np.zeros((2000, 2000, 3), np.uint8), photometric="rgb", compression="deflate")
    with tifffile.TiffFile(tmp_path / "a", mode="r+") as file:
        file.pages[0].tags[278].overwrite(2000)
        for tag in (273, 279):
            file.pages[0].tags[tag].overwrite(file.pages[0].tags[tag].value[:1])
    with pytest.raises(DataError, match="a requires 11 MiB at once"):
        verify_image(tmp_path / "a")


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (61, 90)], ids=str)
@pytest.mark.parametrize("bands", [1, 3])
def test_an_interlaced_png_is_decoded(tmp_path, size, bands):
    pyvips = pytest.importorskip("pyvips")
    pyvips.Image.new_from_array(make_image(*size)[..., :bands]).pngsave(str(tmp_path / "a"), interlace=True)
    assert (tmp_path / "a").read_bytes()[28] == 1
    assert verify_image(tmp_path / "a").height_px == size[1]


def build_png(data, header=(4, 3, 8, 2, 0, 0, 0)):
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *header)), (b"IDAT", data[:9]), (b"IDAT", data[9:]), (b"IEND", b"")]
    parts = [struct.pack(">I", len(data)) + kind + data + zlib.crc32(kind + data).to_bytes(4) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


ROW = bytes(range(1, 13))
ROWS = zlib.compress(b"\0" + ROW + b"\1" + ROW + b"\4" + ROW)
BROKEN = [
    (build_png(zlib.compress((b"\0" + ROW) * 2)), "its data end after 2 of 3 rows"),
    (build_png(zlib.compress((b"\0" + ROW) * 3 + b"\0")), "excess data after 3 rows"),
    (build_png(zlib.compress(b"\0" + ROW + b"\5" + ROW + b"\0" + ROW)), "an invalid filter type after 1 of 3 rows"),
    (build_png(ROWS[:-1] + bytes([ROWS[-1] ^ 1])), "its data do not inflate after 0 of 3 rows"),
    (build_png(ROWS[:-2]), "its data end after 3 of 3 rows"),
    (build_png(ROWS + b"more"), "excess data after 3 of 3 rows"),
    (build_png(ROWS, (4, 3, 8, 5, 0, 0, 0)), "colour type 5"),
    (build_png(ROWS, (4, 3, 4, 2, 0, 0, 0)), "4 bits, colour type 2"),
    (build_png(ROWS, (0, 3, 8, 2, 0, 0, 0)), "0x3 px"),
    (build_png(ROWS, (4, 3, 8, 2, 0, 0, 0))[:-20] + b"\0" * 8, "no end marker"),
]


def test_a_handmade_png_is_verified(tmp_path):
    (tmp_path / "a").write_bytes(build_png(ROWS))
    assert verify_image(tmp_path / "a").height_px == 3


@pytest.mark.parametrize(("content", "reason"), BROKEN, ids=[reason for _, reason in BROKEN])
def test_an_invalid_png_is_refused(tmp_path, content, reason):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        verify_image(tmp_path / "a")
