"""Find the IP-Adapters of a request, and read their image prompts. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from linfusion_cli.core.errors import DataError
from linfusion_cli.core.fs import expand_home
from linfusion_cli.images.read.source import SourceImage, apply_orientation, inspect_source, read_source_rows
from linfusion_cli.models.locate.ip_adapter import Adapter, find_adapter, find_encoder, read_adapter
from linfusion_cli.settings.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

MAX_IMAGE_PX = 1 << 26  # of an image prompt: it is read as a whole, and the encoder scales it to a few hundred pixels
WHITE = (255, 255, 255)  # the background of transparent images


def find_ip_adapters(request: Request, family: str) -> list[Adapter]:
    """Return the adapters of `request` for a model of `family`; raise Unavailable, DataError or InputNotFound."""
    images = [inspect_image(adapter.image) for adapter in request.ip_adapter]  # before models are downloaded
    adapters = []
    for requested, image in zip(request.ip_adapter, images, strict=True):
        location = find_adapter(requested.model, family, request.execution.download)
        weights = read_adapter(location.path)
        encoder = find_encoder(request.ip_image_encoder, weights, location, request.execution.download)
        adapters.append(Adapter(weights, encoder, image, requested.scale))
    return adapters


def inspect_image(name: str) -> SourceImage:
    """Return the image of --ip-image; raise InputNotFound or DataError."""
    image = inspect_source(expand_home(name))
    if image.size.area > MAX_IMAGE_PX:
        reason = f"--ip-image {name} is {image.size} px; the limit is {MAX_IMAGE_PX >> 20} megapixels."
        raise DataError(reason, "Make it smaller: the encoder scales it to a few hundred pixels.")
    return image


def read_image(image: SourceImage, notify: Callable[[str], None]) -> Image:
    """Read the image, with its EXIF orientation applied, as 8-bit sRGB on a white background; raise DataError."""
    from PIL import Image

    rows = [np.rint(band * 255).astype(np.uint8) for band in read_source_rows(image, WHITE, notify)]
    stored = np.concatenate(rows)
    read = apply_orientation(lambda top, bottom, left, right: stored[top:bottom, left:right], image)
    return Image.fromarray(read(0, image.height_px, 0, image.width_px))
