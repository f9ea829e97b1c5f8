import io

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from linfusion_cli.images import srgb_profile
from tests.images.conftest import make_image
from tests.images.sources import (
    FORMATS,
    HEIGHT,
    LAB_PROFILE,
    PIXELS,
    SAVING,
    TRANSPARENT,
    WIDTH,
    flattened,
    read,
    saved,
    swapped_profile,
)

pytestmark = pytest.mark.usefixtures("nothing_printed")


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
def test_a_profile_is_applied(tmp_path, format):
    path = saved(tmp_path / "a", PIXELS, format, icc_profile=swapped_profile(), **SAVING[format])
    theirs = ImageCms.ImageCmsProfile(io.BytesIO(swapped_profile()))
    srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
    expected = np.asarray(ImageCms.profileToProfile(Image.open(path), theirs, srgb, intent)).astype(float)
    assert np.abs(expected - PIXELS).max() > 40
    np.testing.assert_allclose(read(path), expected, atol=4 if format == "jpeg" else 1)


def test_a_profile_is_applied_to_all_of_sixteen_bits(tmp_path):
    pixels = make_image(WIDTH, HEIGHT, 16)
    profile = [(34675, "B", len(swapped_profile()), swapped_profile(), True)]
    tifffile.imwrite(tmp_path / "a", pixels, photometric="rgb", extratags=profile)
    found = read(tmp_path / "a") * 257
    assert np.abs(found - pixels[..., [1, 0, 2]]).max() < 65  # red and green are swapped, nothing else
    assert len(np.unique(found.round())) > 5000


def test_a_profile_leaves_alpha_alone(tmp_path):
    path = saved(tmp_path / "a", TRANSPARENT, "png", icc_profile=swapped_profile())
    seen = flattened(TRANSPARENT[..., [1, 0, 2, 3]], (0, 100, 0))
    np.testing.assert_allclose(read(path, (0, 100, 0)), seen, atol=1.01)


@pytest.mark.parametrize(
    "profile", [srgb_profile(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_a_profile_of_srgb_changes_nothing(tmp_path, profile):
    path = saved(tmp_path / "a", PIXELS, "png", icc_profile=profile)
    np.testing.assert_allclose(read(path), PIXELS, atol=1e-4)


UNUSABLE = {"rubbish": b"rubbish" * 99, "short": b"abc", "cut": srgb_profile()[:300], "lab": LAB_PROFILE}


@pytest.mark.parametrize("profile", UNUSABLE)
@pytest.mark.parametrize("format", FORMATS)
def test_an_unusable_profile_is_said_and_left_out(tmp_path, format, profile):
    path, said = saved(tmp_path / "a", PIXELS, format, icc_profile=UNUSABLE[profile], **SAVING[format]), []
    expected = np.asarray(Image.open(path)).astype(float)
    np.testing.assert_allclose(read(path, notify=said.append), expected, atol=2 if format == "jpeg" else 1e-4)
    assert said == [f"The colour profile in {path} cannot be used, so its colours are taken as sRGB."]


@pytest.mark.parametrize("format", ["png", "jpeg", "tiff"])
def test_a_profile_of_other_channels_is_said_and_left_out(tmp_path, format):
    path, said = saved(tmp_path / "a", PIXELS[..., 0], format, icc_profile=srgb_profile(), **SAVING[format]), []
    expected = np.asarray(Image.open(path).convert("RGB")).astype(float)
    np.testing.assert_allclose(read(path, notify=said.append), expected, atol=2 if format == "jpeg" else 1e-4)
    assert len(said) == 1


def test_cmyk_with_a_profile_of_rgb_is_taken_as_common_cmyk(tmp_path):
    inks, said = Image.new("CMYK", (20, 20), (0, 255, 0, 0)), []
    with_profile = saved(tmp_path / "a", inks, "tiff", icc_profile=srgb_profile())
    without = saved(tmp_path / "b", inks, "tiff")
    np.testing.assert_array_equal(read(with_profile, notify=said.append), read(without))
    assert "common CMYK" in said[0]
