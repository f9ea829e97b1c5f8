"""Input images for the tests of `images/read/source.py`, and helpers that save and read them."""

import numpy as np
from PIL import Image, ImageCms

from linfusion_cli.images import build_srgb_profile
from linfusion_cli.images.read.source import inspect_source, read_source_rows
from tests.images.conftest import make_image

WIDTH, HEIGHT = 90, 70
SAVE_OPTIONS = {
    "png": {},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"lossless": True, "exact": True},
    "tiff": {"compression": "tiff_lzw"},
}
FORMATS = list(SAVE_OPTIONS)
LOSSLESS = ["png", "webp", "tiff"]
PIXELS = make_image(WIDTH, HEIGHT)
TRANSPARENT = np.dstack([PIXELS, np.linspace(0, 255, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint8)])
LAB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def fail_on_notice(text):
    raise AssertionError(text)


def read_pixels(path, background=None, notify=fail_on_notice):
    """Return all pixels of the stored image on the 8-bit scale, as float."""
    return np.concatenate(list(read_source_rows(inspect_source(path), background, notify))) * 255


def save_image(path, pixels, format, **options):
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, format, **options)
    return path


def build_swapped_profile():
    """Return an sRGB profile with red and green swapped."""
    profile = bytearray(build_srgb_profile())
    entries = range(132, 132 + 12 * int.from_bytes(profile[128:132]), 12)
    at = {bytes(profile[entry : entry + 4]): entry for entry in entries}
    profile[at[b"rXYZ"] : at[b"rXYZ"] + 4], profile[at[b"gXYZ"] : at[b"gXYZ"] + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


def blend(rgba, background):
    alpha = rgba[..., 3:] / np.iinfo(rgba.dtype).max
    return rgba[..., :3] * alpha + np.array(background) * (1 - alpha)
