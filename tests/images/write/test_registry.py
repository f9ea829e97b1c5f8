import subprocess
import sys

import numpy as np
import pytest

from linfusion_cli.core.errors import UsageError
from linfusion_cli.images import FORMATS, compute_max_file_bytes, open_sink, resolve_format
from tests.images.conftest import list_files

COMBINATIONS = [
    *(("tiff", compression, bits) for compression in ("deflate", "zstd", "lzw", "none") for bits in (8, 16)),
    ("tiff", "jpeg", 8),
    ("png", None, 8),
    ("png", None, 16),
    ("jpeg", None, 8),
]


@pytest.mark.parametrize(
    ("path", "named", "expected"),
    [("a.tif", None, "tiff"), ("A.TIFF", None, "tiff"), ("x/a.png", None, "png"), ("a.b.JPEG", None, "jpeg"),
     ("a.jpg", None, "jpeg"), ("a.png", "tiff", "tiff"), ("a", "png", "png")],
)  # fmt: skip
def test_format_for(path, named, expected):
    assert resolve_format(path, named) == expected
    assert expected in FORMATS


@pytest.mark.parametrize(("path", "named"), [("a.gif", None), ("a", None), (".png", None), ("a.png", "webp")])
def test_errors_for_unknown_formats_contain_the_choices(path, named):
    with pytest.raises(UsageError, match="tiff.*png"):
        resolve_format(path, named)


@pytest.mark.parametrize(
    ("format", "bits", "options"),
    [("jpeg", 16, {}), ("tiff", 16, {"compression": "jpeg"}), ("png", 8, {"compression": "zstd"}), ("png", 12, {}),
     ("tiff", 8, {"compression": "lzma"}), ("jpeg", 8, {"jpeg_quality": 0}), ("bmp", 8, {})],
)  # fmt: skip
def test_unsupported_combinations(tmp_path, info, format, bits, options):
    with pytest.raises(UsageError):
        open_sink(tmp_path / "out", format, (8, 8), bits, info, **options)
    assert list_files(tmp_path) == []


def test_every_format_has_a_default_compression(tmp_path, info):
    for format in FORMATS:
        open_sink(tmp_path / format, format, (8, 8), 8, info).abort()


@pytest.mark.parametrize("size", [(1, 1), (513, 600)], ids=str)
@pytest.mark.parametrize(("format", "compression", "bits"), COMBINATIONS)
def test_noise_fits_into_the_max_file_bytes(tmp_path, info, format, compression, bits, size):
    noise = np.random.default_rng(0).integers(0, 2**bits, (size[1], size[0], 3), f"uint{bits}")
    sink = open_sink(tmp_path / "out", format, size, bits, info, compression, jpeg_quality=100)
    sink.write(noise)
    sink.close()
    max_bytes = compute_max_file_bytes(format, size, bits, compression)
    assert (tmp_path / "out").stat().st_size <= max_bytes
    assert max_bytes <= 1.5 * (-(-size[0] // 512) * -(-size[1] // 512)) * 512 * 512 * 3 * bits // 8 + (2 << 20)


def test_importing_is_quick():
    code = """
import sys, linfusion_cli.images
heavy = {"torch", "tifffile", "imagecodecs", "PIL", "isal"} & set(sys.modules)
raise SystemExit(", ".join(heavy))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == ""
