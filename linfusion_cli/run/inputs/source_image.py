"""Inspect the source image of `linfusion upscale`, and fit the requested size to its aspect ratio."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size, compute_fit_size
from linfusion_cli.core.units import MIN_PX
from linfusion_cli.images.read.source import SourceImage, build_transparency_error, inspect_source
from linfusion_cli.settings.request import Request


def resolve_source_image(request: Request) -> tuple[Request, SourceImage | None]:
    """Return the request with the exact output size, and its source image; None if it has none.

    Raises UsageError if the size has another aspect ratio or is too small, and the errors of `inspect_source`.
    """
    if request.source is None:
        return request, None
    image = inspect_source(request.source.image)
    size = compute_fit_size(request.size, image.size)
    if size is None:
        matching = compute_fit_size(Size(*[max(request.size.pair)] * 2), image.size)
        assert matching is not None  # a square box fits every image
        shape = f"{request.source.image}, which is {image.size} px"
        reason = f"--size {request.size} has another aspect ratio than {shape}."
        hint = f"Use --size {max(matching.pair)} for the longer side, or --size {matching}."
        raise UsageError(reason, hint, "size")
    if min(size.pair) < MIN_PX:
        reason = f"--size {size} is too small for {request.source.image}: the minimum is {MIN_PX} px per side."
        raise UsageError(reason, "Use a larger size.", "size")
    if max(size.pair) < max(image.size.pair):
        reason = f"--size {size} is smaller than {request.source.image}, which is {image.size} px."
        raise UsageError(reason, "Use a larger size: upscale does not reduce images.", "size")
    if image.has_alpha and request.source.background is None:
        raise build_transparency_error(request.source.image)
    return replace(request, size=size), image


def double_image_size(path: Path) -> Size:
    """Return twice the size of an image, the default size of `upscale`; raises the errors of `inspect_source`."""
    return inspect_source(path).size.times(2)
