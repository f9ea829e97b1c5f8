"""Inspect the source image of `linfusion upscale`, and fit the requested size to its aspect ratio."""

from __future__ import annotations

from dataclasses import replace

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size, compute_fit_size
from linfusion_cli.core.units import MIN_PX
from linfusion_cli.images.read.source import SourceImage, build_transparency_error, inspect_source
from linfusion_cli.settings.request import UpscaleRequest


def resolve_source_image(request: UpscaleRequest) -> tuple[UpscaleRequest, SourceImage]:
    """Return the request with the exact output size, and the source image.

    Raises UsageError if the size has another aspect ratio or is too small, and the errors of `inspect_source`.
    """
    image = inspect_source(request.image)
    size = compute_fit_size(request.size, image.size)
    if size is None:
        matching = compute_fit_size(Size(*[max(request.size.pair)] * 2), image.size)
        assert matching is not None  # a square box fits every image
        reason = f"--size {request.size} has another aspect ratio than {request.image}, which is {image.size} px."
        hint = f"Use --size {max(matching.pair)} for the longer side, or --size {matching}."
        raise UsageError(reason, hint, "size")
    if min(size.pair) < MIN_PX:
        reason = f"--size {size} is too small for {request.image}: the minimum is {MIN_PX} px per side."
        raise UsageError(reason, "Use a larger size.", "size")
    if image.has_alpha and request.background is None:
        raise build_transparency_error(request.image)
    return replace(request, size=size), image
