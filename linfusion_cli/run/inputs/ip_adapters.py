"""The IP-Adapters of a request, and the pictures they listen to. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from linfusion_cli.core.errors import DataError
from linfusion_cli.core.units import user_path
from linfusion_cli.images.read.source import SourceImage, apply_orientation, inspect_source, source_rows
from linfusion_cli.models.locate.ip_adapter import Adapter, find_adapter, find_encoder, read_adapter
from linfusion_cli.sampling.phases import broadcast_per_phase
from linfusion_cli.settings.request import ImageRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

MAX_IMAGE_PX = 1 << 26  # of a picture that is listened to: it is held whole, and an encoder sees a few hundred pixels
WHITE = (255, 255, 255)  # behind transparent parts


def find_ip_adapters(request: ImageRequest, family: str) -> list[Adapter]:
    """The adapters of `request` for a model of `family`; raises Unavailable, DataError or InputMissing."""
    images = [inspect_image(name) for name in request.ip_image]
    scales = broadcast_per_phase(request.ip_scale, len(images), "ip_scale")
    found = []
    for name, image, scale in zip(request.ip_adapter, images, scales, strict=True):
        location = find_adapter(name, family, request.download)
        weights = read_adapter(location.path)
        encoder = find_encoder(request.ip_image_encoder, weights, location, request.download)
        found.append(Adapter(weights, encoder, image, scale))
    return found


def inspect_image(name: str) -> SourceImage:
    """The picture that --ip-image names; raises InputMissing or DataError."""
    image = inspect_source(user_path(name))
    if image.size.area > MAX_IMAGE_PX:
        reason = f"--ip-image {name} is {image.size} px, and {MAX_IMAGE_PX >> 20} megapixels are listened to at most."
        raise DataError(reason, "Make it smaller: the encoder sees a few hundred pixels of a side.")
    return image


def read_image(image: SourceImage, notify: Callable[[str], None]) -> Image:
    """All of it as it is to be seen, in sRGB of 8 bits, transparent parts white; raises DataError."""
    from PIL import Image

    rows = [np.rint(band * 255).astype(np.uint8) for band in source_rows(image, WHITE, notify)]
    stored = np.concatenate(rows)
    read = apply_orientation(lambda top, bottom, left, right: stored[top:bottom, left:right], image)
    return Image.fromarray(read(0, image.height_px, 0, image.width_px))
