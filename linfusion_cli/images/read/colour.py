"""Conversion of input images to sRGB by their ICC profiles."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from linfusion_cli.images.read.info import PNG_MAGIC

PROFILE = "icc-profile-data"
PIL_MODES = {"b-w": "L", "grey16": "L", "srgb": "RGB", "rgb16": "RGB", "cmyk": "CMYK"}
ICC_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
GRID = np.linspace(0, 65535, 9)  # per channel: the colours that are compared to detect an sRGB profile
MAX_SRGB_ERROR = 65535 / 255 / 2  # half a step of 8 bits


def convert_to_srgb(image: Any, path: Path, notify: Callable[[str], None]) -> Any:
    """Convert a pyvips image to sRGB with the same bit depth and alpha channel: 3 or 4 bands.

    The profile is applied with relative colorimetric intent. A profile that is damaged or has another colour space than
    the image is ignored, which is reported to `notify`. Without a profile, CMYK uses the default profile of libvips,
    and everything else is taken as sRGB.
    """
    mode, profile = PIL_MODES[image.interpretation], _get_profile(image, path)
    if profile is not None and not _is_usable(profile, mode):
        fallback = "the default CMYK profile" if mode == "CMYK" else "sRGB"
        notify(f"The colour profile in {path} is not usable; the image is read as {fallback} instead.")
        profile = None
    if profile is not None and not (mode == "RGB" and _is_srgb(profile)):
        return _apply_profile(image)
    if mode == "CMYK":
        return _apply_profile(_replace_profile(image, None))
    if mode == "RGB":
        return image
    return image.colourspace("rgb16" if image.format == "ushort" else "srgb")


def _apply_profile(image: Any) -> Any:
    """Convert from the embedded profile, or libvips' default CMYK profile, to sRGB."""
    depth = 16 if image.format == "ushort" else 8
    return image.icc_transform("srgb", embedded=True, input_profile="cmyk", intent="relative", depth=depth)


def _replace_profile(image: Any, profile: bytes | None) -> Any:
    """Return a copy of the image with another embedded profile, or without one."""
    from pyvips import GValue

    image = image.copy()
    image.remove(PROFILE)
    if profile is not None:
        image.set_type(GValue.blob_type, PROFILE, profile)
    return image


def _get_profile(image: Any, path: Path) -> bytes | None:
    """Return the embedded profile, empty bytes if libvips rejected it, or None if there is no profile."""
    if image.get_typeof(PROFILE):
        return image.get(PROFILE)
    return b"" if _png_has_profile(path) else None


def _png_has_profile(path: Path) -> bool:
    """Return whether a PNG has an iCCP chunk before its pixels; libpng drops invalid ones silently."""
    with path.open("rb") as file:
        if file.read(len(PNG_MAGIC)) != PNG_MAGIC:
            return False
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            if head[4:] == b"iCCP":
                return True
            file.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)
    return False


def _is_usable(profile: bytes, mode: str) -> bool:
    """Return whether littlecms can convert this mode to sRGB by the profile; libvips would silently use another."""
    from PIL import ImageCms

    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space  # pyright: ignore[reportAttributeAccessIssue]  # a CmsProfile, not a file
        if space.strip() != ICC_SPACES[mode]:
            return False
        ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ValueError, ImageCms.PyCMSError):
        return False
    return True


def _is_srgb(profile: bytes) -> bool:
    """Return whether the profile changes every colour by less than half an 8-bit step; then no conversion is needed."""
    import pyvips

    colours = np.array(list(product(GRID, repeat=3))).round().astype(np.uint16)
    image = pyvips.Image.new_from_array(colours[None], interpretation="rgb16")
    converted = _apply_profile(_replace_profile(image, profile)).numpy()[0]
    return bool(np.abs(converted - colours.astype(float)).max() < MAX_SRGB_ERROR)
