"""Find the ControlNets of a request and their control images, and reject unsuitable ones early. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.fs import expand_home
from linfusion_cli.core.geometry import MAX_ASPECT_ERROR, Size, aspect_error
from linfusion_cli.images.read.source import SourceImage, inspect_source
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.locate.controlnet import check_fits, find_controlnet, is_union, parse_control_type
from linfusion_cli.settings.request import Request


@dataclass(frozen=True)
class ControlNetSpec:
    """A ControlNet: its folder, control image and scale; for a union model, the number of the image's control type."""

    folder: Path
    image: SourceImage
    scale: float
    kind: int | None


@dataclass(frozen=True)
class ControlNetSpecs:
    """The ControlNets of a request, and the indices of the phases that use them."""

    specs: tuple[ControlNetSpec, ...] = ()
    phases: frozenset[int] = frozenset()

    def for_phase(self, index: int) -> tuple[ControlNetSpec, ...]:
        """Return the ControlNets that the phase with this index uses."""
        return self.specs if index in self.phases else ()

    @property
    def max_image_px(self) -> int:
        """The area of the largest control image."""
        return max((control.image.size.area for control in self.specs), default=0)

    @property
    def held_bytes(self) -> int:
        """The most memory that reading the control images, one after the other, needs."""
        return max((control.image.held_bytes for control in self.specs), default=0)


def find_controlnets(request: Request, model: Model, phases: int) -> ControlNetSpecs:
    """Return the ControlNets of `request` for `model` and a number of phases.

    Raises UsageError, Unavailable, InputNotFound or DataError if one of them or an image is missing or unsuitable.
    """
    if not request.controlnet:
        return ControlNetSpecs()
    used_phases = parse_phases(request.control_phases, phases)
    folders = [find_controlnet(control.model, request.execution.download) for control in request.controlnet]
    for folder in folders:
        check_fits(folder, model)
    kinds = match_control_types(request, folders)
    scales = [control.scale for control in request.controlnet]
    images = [inspect_control_image(control.image, request.size) for control in request.controlnet]
    return ControlNetSpecs(tuple(map(ControlNetSpec, folders, images, scales, kinds)), used_phases)


def parse_phases(names: tuple[str, ...], phases: int) -> frozenset[int]:
    """Return the phase indices for `base`, `all` and numbers; raise UsageError for a phase that does not exist."""
    indices: set[int] = set()
    for name in names:
        indices |= set(range(phases)) if name == "all" else {0 if name == "base" else int(name)}
    if max(indices) >= phases:
        existing = "only phase 0" if phases == 1 else f"phases 0 to {phases - 1}"
        reason = f"--control-phases {max(indices)} does not exist: this run has {existing}."
        raise UsageError(reason, "Use base, all, or smaller numbers.", "control_phases")
    return frozenset(indices)


def match_control_types(request: Request, folders: list[Path]) -> list[int | None]:
    """Return the number of each image's control type, None for models with a single type.

    Raises UsageError if the number of control types differs from the number of union models.
    """
    union = [is_union(folder) for folder in folders]
    given_types = [control.type for control in request.controlnet if control.type is not None]
    if sum(union) != len(given_types):
        given = ",".join(given_types) or "(not given)"
        reason = f"--control-type {given}: {sum(union)} of {len(folders)} ControlNets are union models."
        hint = "Give one type, such as canny, for each union model, in their order; other models take none."
        raise UsageError(reason, hint, "control_type")
    types = iter(given_types)
    return [
        parse_control_type(folder, next(types)) if one else None for folder, one in zip(folders, union, strict=True)
    ]


def inspect_control_image(name: str, size: Size) -> SourceImage:
    """Return the control image `name` for an output of `size`; raise UsageError if its aspect ratio differs."""
    image = inspect_source(expand_home(name))
    if aspect_error(image.size, size) > MAX_ASPECT_ERROR:
        reason = f"--control-image {name} is {image.size} px: its aspect ratio differs from --size {size}."
        raise UsageError(reason, "Crop it, or choose another --size: it would be distorted.", "control_image")
    return image
