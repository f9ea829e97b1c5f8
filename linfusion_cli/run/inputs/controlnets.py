"""The ControlNets of a request and their pictures: found, and refused early. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import MOST_BEND, Size, bend
from linfusion_cli.core.units import user_path
from linfusion_cli.images.read.source import SourcePicture, inspect_source
from linfusion_cli.models.files.parts import Model
from linfusion_cli.models.locate.controlnet import check_fits, find_controlnet, is_union, kind_number
from linfusion_cli.sampling.phases import spread
from linfusion_cli.settings.request import PictureRequest


@dataclass(frozen=True)
class FoundControl:
    """A ControlNet's folder, its picture, its scale, and what the picture shows, by a union model's number for it."""

    folder: Path
    picture: SourcePicture
    scale: float
    kind: int | None


@dataclass(frozen=True)
class Controls:
    """The ControlNets of a request, and the indices of the phases in which they act."""

    found: tuple[FoundControl, ...] = ()
    phases: frozenset[int] = frozenset()

    def in_phase(self, index: int) -> tuple[FoundControl, ...]:
        """Those that act in the phase of this index."""
        return self.found if index in self.phases else ()

    @property
    def largest_px(self) -> int:
        """The area of the largest picture."""
        return max((control.picture.size.area for control in self.found), default=0)

    @property
    def held_bytes(self) -> int:
        """What reading the pictures, one after the other, holds at once."""
        return max((control.picture.held_bytes for control in self.found), default=0)


def find_controls(request: PictureRequest, model: Model, phases: int) -> Controls:
    """What `request` asks for, for `model` and so many phases.

    Raises Unavailable, DataError or InputMissing for what is not there or does not fit, and UsageError.
    """
    if not request.controlnet:
        return Controls()
    acting = acting_phases(request.control_phases, phases)
    folders = [find_controlnet(name, request.download) for name in request.controlnet]
    for folder in folders:
        check_fits(folder, model)
    kinds = picture_kinds(request, folders)
    scales = spread(request.control_scale, len(folders), "control_scale")
    pictures = [checked_picture(name, request.size) for name in request.control_image]
    return Controls(tuple(map(FoundControl, folders, pictures, scales, kinds)), acting)


def acting_phases(written: tuple[str, ...], phases: int) -> frozenset[int]:
    """The indices that `base`, `all` and numbers mean; raises UsageError for a phase that is not there."""
    indices: set[int] = set()
    for name in written:
        indices |= set(range(phases)) if name == "all" else {0 if name == "base" else int(name)}
    if max(indices) >= phases:
        reason = f"--control-phases {max(indices)} is no phase: there are {phases}, counted from 0."
        raise UsageError(reason, "Use base, all, or smaller numbers.", "control_phases")
    return frozenset(indices)


def picture_kinds(request: PictureRequest, folders: list[Path]) -> list[int | None]:
    """The kind of each picture, None for ControlNets that know one only; raises UsageError where they do not match."""
    union = [is_union(folder) for folder in folders]
    if sum(union) != len(request.control_type):
        given = ",".join(request.control_type) or "of none"
        reason = f"--control-type {given} does not match {sum(union)} union models among {len(folders)} ControlNets."
        way_out = "Give one for each union model, in their order, such as canny; others take none."
        raise UsageError(reason, way_out, "control_type")
    written = iter(request.control_type)
    return [kind_number(folder, next(written)) if one else None for folder, one in zip(folders, union, strict=True)]


def checked_picture(name: str, size: Size) -> SourcePicture:
    """The control picture `name`, for a picture of `size`; raises UsageError for other proportions."""
    picture = inspect_source(user_path(name))
    if bend(picture.size, size) > MOST_BEND:
        reason = f"--control-image {name} is {picture.size} and has not the proportions of {size}."
        raise UsageError(reason, "Crop it, or choose another --size: it would be stretched.", "control_image")
    return picture
