"""Colour profiles of pictures that are read: from whatever they say their numbers mean to sRGB."""

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
GRID = np.linspace(0, 65535, 9)  # of each channel: colours that tell whether a profile is that of sRGB
SAME = 65535 / 255 / 2  # half a step of 8 bits


def to_srgb(image: Any, path: Path, notify: Callable[[str], None]) -> Any:
    """The pyvips image in sRGB, of as many bits, with its alpha channel if it has one: 3 or 4 bands.

    Its profile is applied with relative colorimetric intent. One that is damaged, or for other colours than the image
    has, is left out, and `notify` gets a sentence. Without a profile CMYK is what vips takes it for, all else sRGB.
    """
    mode, profile = PIL_MODES[image.interpretation], _profile(image, path)
    if profile is not None and not _is_usable(profile, mode):
        taken_as = "those of common CMYK" if mode == "CMYK" else "sRGB"
        notify(f"The colour profile in {path} cannot be used, so its colours are taken as {taken_as}.")
        profile = None
    if profile is not None and not (mode == "RGB" and _is_srgb(profile)):
        return _converted(image)
    if mode == "CMYK":
        return _converted(_with_profile(image, None))
    if mode == "RGB":
        return image
    return image.colourspace("rgb16" if image.format == "ushort" else "srgb")


def _converted(image: Any) -> Any:
    depth = 16 if image.format == "ushort" else 8
    return image.icc_transform("srgb", embedded=True, input_profile="cmyk", intent="relative", depth=depth)


def _with_profile(image: Any, profile: bytes | None) -> Any:
    from pyvips import GValue

    image = image.copy()
    image.remove(PROFILE)
    if profile is not None:
        image.set_type(GValue.blob_type, PROFILE, profile)
    return image


def _profile(image: Any, path: Path) -> bytes | None:
    """The embedded profile; empty if it was so bad that vips did not keep it."""
    if image.get_typeof(PROFILE):
        return image.get(PROFILE)
    return b"" if _png_has_profile(path) else None


def _png_has_profile(path: Path) -> bool:
    """Whether there is a profile before the pixels of a PNG: libpng keeps quiet about those that it leaves out."""
    with path.open("rb") as file:
        if file.read(len(PNG_MAGIC)) != PNG_MAGIC:
            return False
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            if head[4:] == b"iCCP":
                return True
            file.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)
    return False


def _is_usable(profile: bytes, mode: str) -> bool:
    """Whether littlecms makes sRGB of such colours with this profile: vips would use another without a word."""
    from PIL import ImageCms

    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != ICC_SPACES[mode]:
            return False
        ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ValueError, ImageCms.PyCMSError):
        return False
    return True


def _is_srgb(profile: bytes) -> bool:
    """Whether the profile changes no colour by as much as half a step of 8 bits: then numbers are better left alone."""
    import pyvips

    colours = np.array(list(product(GRID, repeat=3))).round().astype(np.uint16)
    image = pyvips.Image.new_from_array(colours[None], interpretation="rgb16")
    found = _converted(_with_profile(image, profile)).numpy()[0]
    return bool(np.abs(found - colours.astype(float)).max() < SAME)
