"""The source image of `linfusion upscale`: inspect it and fit the requested size to its proportions."""

from __future__ import annotations

from dataclasses import replace

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size, fit_size
from linfusion_cli.core.units import MIN_PX
from linfusion_cli.images.read.source import SourceImage, inspect_source, transparent
from linfusion_cli.settings.request import UpscaleRequest


def open_source(request: UpscaleRequest) -> tuple[UpscaleRequest, SourceImage]:
    """The request with the exact size of its result, and the picture it begins with.

    Raises UsageError for a size of other proportions, and what `inspect_source` raises.
    """
    image = inspect_source(request.image)
    size = fit_size(request.size, image.size)
    if size is None:
        matching = fit_size(Size(*[max(request.size.pair)] * 2), image.size)
        reason = f"--size {request.size} has not the proportions of {request.image}, which is {image.size}."
        raise UsageError(reason, f"Use --size {max(matching.pair)}, the longer side, or --size {matching}.", "size")
    if min(size.pair) < MIN_PX:
        raise UsageError(f"{request.image} at --size {size} is too small.", f"Use {MIN_PX} px or more.", "size")
    if image.has_alpha and request.background is None:
        raise transparent(request.image)
    return replace(request, size=size), image
