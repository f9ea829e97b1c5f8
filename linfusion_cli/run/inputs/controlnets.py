"""The ControlNets of a request and their pictures: found, and refused early. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import MAX_ASPECT_ERROR, Size, aspect_error
from linfusion_cli.core.units import user_path
from linfusion_cli.images.read.source import SourceImage, inspect_source
from linfusion_cli.models.files.parts import Model
from linfusion_cli.models.locate.controlnet import check_fits, find_controlnet, is_union, kind_number
from linfusion_cli.sampling.phases import broadcast_per_phase
from linfusion_cli.settings.request import ImageRequest


@dataclass(frozen=True)
class ControlNetSpec:
    """A ControlNet's folder, its picture, its scale, and what the picture shows, by a union model's number for it."""

    folder: Path
    image: SourceImage
    scale: float
    kind: int | None


@dataclass(frozen=True)
class ControlNetSpecs:
    """The ControlNets of a request, and the indices of the phases in which they act."""

    found: tuple[ControlNetSpec, ...] = ()
    phases: frozenset[int] = frozenset()

    def in_phase(self, index: int) -> tuple[ControlNetSpec, ...]:
        """Those that act in the phase of this index."""
        return self.found if index in self.phases else ()

    @property
    def largest_px(self) -> int:
        """The area of the largest picture."""
        return max((control.image.size.area for control in self.found), default=0)

    @property
    def held_bytes(self) -> int:
        """What reading the pictures, one after the other, holds at once."""
        return max((control.image.held_bytes for control in self.found), default=0)


def find_controlnets(request: ImageRequest, model: Model, phases: int) -> ControlNetSpecs:
    """What `request` asks for, for `model` and so many phases.

    Raises Unavailable, DataError or InputMissing for what is not there or does not fit, and UsageError.
    """
    if not request.controlnet:
        return ControlNetSpecs()
    acting = parse_phases(request.control_phases, phases)
    folders = [find_controlnet(name, request.download) for name in request.controlnet]
    for folder in folders:
        check_fits(folder, model)
    kinds = match_control_types(request, folders)
    scales = broadcast_per_phase(request.control_scale, len(folders), "control_scale")
    images = [open_control_image(name, request.size) for name in request.control_image]
    return ControlNetSpecs(tuple(map(ControlNetSpec, folders, images, scales, kinds)), acting)


def parse_phases(written: tuple[str, ...], phases: int) -> frozenset[int]:
    """The indices that `base`, `all` and numbers mean; raises UsageError for a phase that is not there."""
    indices: set[int] = set()
    for name in written:
        indices |= set(range(phases)) if name == "all" else {0 if name == "base" else int(name)}
    if max(indices) >= phases:
        reason = f"--control-phases {max(indices)} is no phase: there are {phases}, counted from 0."
        raise UsageError(reason, "Use base, all, or smaller numbers.", "control_phases")
    return frozenset(indices)


def match_control_types(request: ImageRequest, folders: list[Path]) -> list[int | None]:
    """The kind of each picture, None for ControlNets that know one only; raises UsageError where they do not match."""
    union = [is_union(folder) for folder in folders]
    if sum(union) != len(request.control_type):
        given = ",".join(request.control_type) or "of none"
        reason = f"--control-type {given} does not match {sum(union)} union models among {len(folders)} ControlNets."
        hint = "Give one for each union model, in their order, such as canny; others take none."
        raise UsageError(reason, hint, "control_type")
    written = iter(request.control_type)
    return [kind_number(folder, next(written)) if one else None for folder, one in zip(folders, union, strict=True)]


def open_control_image(name: str, size: Size) -> SourceImage:
    """The control picture `name`, for a picture of `size`; raises UsageError for other proportions."""
    image = inspect_source(user_path(name))
    if aspect_error(image.size, size) > MAX_ASPECT_ERROR:
        reason = f"--control-image {name} is {image.size} and has not the proportions of {size}."
        raise UsageError(reason, "Crop it, or choose another --size: it would be stretched.", "control_image")
    return image
