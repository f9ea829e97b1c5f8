import io

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from linfusion_cli.images import build_srgb_profile
from tests.images.conftest import make_image
from tests.images.sources import (
    FORMATS,
    HEIGHT,
    LAB_PROFILE,
    PIXELS,
    SAVE_OPTIONS,
    TRANSPARENT,
    WIDTH,
    blend,
    build_swapped_profile,
    read_pixels,
    save_image,
)

pytestmark = pytest.mark.usefixtures("no_output")


@pytest.mark.parametrize("format", ["jpeg", "tiff"])
def test_cmyk_becomes_srgb(tmp_path, format):
    inks = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    inks[:, 30:, 1], inks[:, 60:, 3] = 255, 255
    path = save_image(tmp_path / "a", Image.fromarray(inks, "CMYK"), format, **SAVE_OPTIONS[format])
    result = read_pixels(path)
    white, magenta, dark = result[35, 10], result[35, 45], result[35, 75]
    assert white.min() > 250 and dark.max() < 60
    assert magenta[0] > 200 and magenta[1] < 60 and 80 < magenta[2] < 180


@pytest.mark.parametrize("format", FORMATS)
def test_a_profile_is_applied(tmp_path, format):
    path = save_image(tmp_path / "a", PIXELS, format, icc_profile=build_swapped_profile(), **SAVE_OPTIONS[format])
    theirs = ImageCms.ImageCmsProfile(io.BytesIO(build_swapped_profile()))
    srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
    expected = np.asarray(ImageCms.profileToProfile(Image.open(path), theirs, srgb, intent)).astype(float)
    assert np.abs(expected - PIXELS).max() > 40
    np.testing.assert_allclose(read_pixels(path), expected, atol=4 if format == "jpeg" else 1)


def test_a_profile_is_applied_with_sixteen_bits(tmp_path):
    pixels = make_image(WIDTH, HEIGHT, 16)
    profile = [(34675, "B", len(build_swapped_profile()), build_swapped_profile(), True)]
    tifffile.imwrite(tmp_path / "a", pixels, photometric="rgb", extratags=profile)
    result = read_pixels(tmp_path / "a") * 257
    assert np.abs(result - pixels[..., [1, 0, 2]]).max() < 65  # only red and green are swapped
    assert len(np.unique(result.round())) > 5000


def test_a_profile_does_not_change_alpha(tmp_path):
    path = save_image(tmp_path / "a", TRANSPARENT, "png", icc_profile=build_swapped_profile())
    expected = blend(TRANSPARENT[..., [1, 0, 2, 3]], (0, 100, 0))
    np.testing.assert_allclose(read_pixels(path, (0, 100, 0)), expected, atol=1.01)


@pytest.mark.parametrize(
    "profile", [build_srgb_profile(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_a_profile_of_srgb_changes_nothing(tmp_path, profile):
    path = save_image(tmp_path / "a", PIXELS, "png", icc_profile=profile)
    np.testing.assert_allclose(read_pixels(path), PIXELS, atol=1e-4)


UNUSABLE = {"random text": b"rubbish" * 99, "short": b"abc", "cut": build_srgb_profile()[:300], "lab": LAB_PROFILE}


@pytest.mark.parametrize("profile", UNUSABLE)
@pytest.mark.parametrize("format", FORMATS)
def test_an_unusable_profile_is_ignored_with_a_notice(tmp_path, format, profile):
    path = save_image(tmp_path / "a", PIXELS, format, icc_profile=UNUSABLE[profile], **SAVE_OPTIONS[format])
    notices = []
    expected = np.asarray(Image.open(path)).astype(float)
    np.testing.assert_allclose(read_pixels(path, notify=notices.append), expected, atol=2 if format == "jpeg" else 1e-4)
    (notice,) = notices
    assert str(path) in notice and "sRGB" in notice


@pytest.mark.parametrize("format", ["png", "jpeg", "tiff"])
def test_a_profile_of_other_channels_is_ignored_with_a_notice(tmp_path, format):
    path = save_image(tmp_path / "a", PIXELS[..., 0], format, icc_profile=build_srgb_profile(), **SAVE_OPTIONS[format])
    notices = []
    expected = np.asarray(Image.open(path).convert("RGB")).astype(float)
    np.testing.assert_allclose(read_pixels(path, notify=notices.append), expected, atol=2 if format == "jpeg" else 1e-4)
    assert len(notices) == 1


def test_cmyk_with_an_rgb_profile_is_read_with_the_default_profile(tmp_path):
    inks, notices = Image.new("CMYK", (20, 20), (0, 255, 0, 0)), []
    with_profile = save_image(tmp_path / "a", inks, "tiff", icc_profile=build_srgb_profile())
    without = save_image(tmp_path / "b", inks, "tiff")
    np.testing.assert_array_equal(read_pixels(with_profile, notify=notices.append), read_pixels(without))
    assert "default CMYK" in notices[0]
