"""Resolve a request to models, files and phases on this machine, or reject it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from linfusion_cli import images
from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.fs import check_distinct
from linfusion_cli.core.geometry import (
    MAX_ASPECT_ERROR,
    Size,
    aspect_error,
    compute_base_size,
    compute_phase_sizes,
    compute_upscale_sizes,
)
from linfusion_cli.hardware.device import pick_device, pick_dtype
from linfusion_cli.images.read.source import SourceImage
from linfusion_cli.models.families.facts import ModelFacts, read_facts
from linfusion_cli.models.files.layout import Model, Part
from linfusion_cli.models.locate.base import find_base, find_local_base
from linfusion_cli.models.locate.files import find_inversion, find_lora
from linfusion_cli.models.locate.ip_adapter import Adapter
from linfusion_cli.models.locate.model import find_linfusion, find_model, find_vae
from linfusion_cli.run.inputs.controlnets import ControlNetSpecs, find_controlnets
from linfusion_cli.run.inputs.ip_adapters import find_ip_adapters
from linfusion_cli.run.inputs.phase_files import build_phase_path
from linfusion_cli.run.inputs.prompt_checks import check_prompts
from linfusion_cli.sampling.phases import Phase, PhaseSizes, build_phases
from linfusion_cli.settings.request import Request


@dataclass(frozen=True)
class ResolvedRequest:
    """A valid request with the models, files and phases that it uses on this machine.

    source_image: the image to upscale; None if the first phase starts from noise.
    linfusion_folder: the folder of the LinFusion weights; None if no phase uses them.
    linfusion_base: the folder of the UNet that the LinFusion weights were trained for, if the difference of `model`
        from it is merged into them; None if they are used unchanged.
    loras: files with their weights.
    textual_inversions: files with their tokens; None for the token in the file.
    """

    request: Request
    format: str
    source_image: SourceImage | None
    model: Model
    vae: Part
    linfusion_folder: Path | None
    linfusion_base: Path | None
    loras: list[tuple[Path, float]]
    textual_inversions: list[tuple[Path, str | None]]
    ip_adapters: list[Adapter]
    facts: ModelFacts
    phases: list[Phase]
    controlnets: ControlNetSpecs

    @property
    def is_downscaled(self) -> bool:
        """True if the last phase is resized to a requested size below the base size, instead of cropped to it."""
        return self.phases[-1].size != self.request.size.round_up(self.facts.multiple_px)

    @property
    def is_base_model(self) -> bool:
        """True if `model` itself is the one that the LinFusion weights were trained for."""
        return self.model.file is None and self.linfusion_base == self.model.get_part("unet").folder

    def visible_size(self, phase: Phase) -> Size:
        """Return the size of the part of `phase` that stays visible: the last phase is cropped to the output."""
        return self.request.size if phase is self.phases[-1] and not self.is_downscaled else phase.size

    @property
    def source_size(self) -> Size | None:
        """The size of the image to upscale."""
        return None if self.source_image is None else self.source_image.size

    @property
    def output_folder(self) -> Path:
        """The folder of the output and of temporary images; if the output is a link, the folder of its target."""
        return self.request.execution.output.resolve().parent

    @property
    def saved_phase_sizes(self) -> list[Size]:
        """The sizes of the images that --save-phases writes.

        That is all phases but the last, which is the output, unless the output is downscaled from it.
        """
        sizes = [phase.size for phase in self.phases]
        return sizes if self.is_downscaled else sizes[:-1]


def resolve_request(request: Request, image: SourceImage | None = None) -> ResolvedRequest:
    """Return `request` resolved on this machine; raise UsageError, Unavailable, InputNotFound or DataError."""
    check_prompts(request)
    file_format = images.resolve_format(request.execution.output, request.format)
    if request.execution.download:
        pick_dtype(request.dtype, pick_device(request.execution.device))  # fails before gigabytes are downloaded
    model = find_model(request.model, request.execution.download)
    vae = find_vae(request.vae, model, request.execution.download)
    loras = [(find_lora(lora.model, request.execution.download), lora.weight) for lora in request.lora]
    inversions = [
        (find_inversion(inversion.model, request.execution.download), inversion.token)
        for inversion in request.textual_inversion
    ]
    facts = read_facts(model, vae)
    facts = facts if request.prediction_type == "auto" else facts.with_prediction_type(request.prediction_type)
    adapters = find_ip_adapters(request, facts.family)
    phases = build_phases(request, choose_phase_sizes(request, facts, image))
    controlnets = find_controlnets(request, model, len(phases))
    linfusion_folder = linfusion_base = None
    is_used = any(phase.attention == "linear" for phase in phases)
    if is_used or request.linfusion not in ("auto", "none"):  # a model given by name must exist
        linfusion_folder = find_linfusion(request.linfusion, model, facts.family, request.execution.download)
    if is_used and linfusion_folder is not None:
        linfusion_base = find_merge_base(request, model, linfusion_folder, facts.family)
    resolved = ResolvedRequest(
        request=request,
        format=file_format,
        source_image=image,
        model=model,
        vae=vae,
        linfusion_folder=linfusion_folder,
        linfusion_base=linfusion_base,
        loras=loras,
        textual_inversions=inversions,
        ip_adapters=adapters,
        facts=facts,
        phases=phases,
        controlnets=controlnets,
    )
    check_output_paths(resolved)
    return resolved


def check_output_paths(resolved: ResolvedRequest) -> None:
    """Raise UsageError if two of the files that the run writes have the same path."""
    request = resolved.request
    files = request.execution.files
    sizes = resolved.saved_phase_sizes if request.save_phases else []
    phases = {f"the {size} phase of --save-phases": build_phase_path(request.execution.output, size) for size in sizes}
    check_distinct(files | phases)


def find_merge_base(request: Request, model: Model, linfusion: Path, family: str) -> Path | None:
    """Return the folder of the UNet that `model` was fine-tuned from; None if the LinFusion weights stay unchanged.

    `auto` merges published weights if the base is available locally, because other weights can be trained for `model`
    itself; it also merges if the request names a base.
    """
    is_base_named = request.linfusion_merge == "auto" and request.linfusion_base != "auto"
    if request.linfusion_merge == "delta" or is_base_named:
        return find_base(request.linfusion_base, model, linfusion, family, request.execution.download)
    if request.linfusion_merge != "auto" or request.linfusion != "auto":
        return None
    return find_local_base(model, linfusion, family)


def choose_phase_sizes(request: Request, facts: ModelFacts, image: SourceImage | None) -> PhaseSizes:
    """Return the sizes of the phases, from the base size or from the source image up to the output."""
    target, multiple = request.size, facts.multiple_px
    native = compute_base_size(target, facts.native_px, multiple)
    base = validate_base_size(request, multiple) or native
    if image is not None:
        return PhaseSizes(
            compute_upscale_sizes(target, image.size, base, multiple), image.size, base, native, from_noise=False
        )
    if request.upscaler == "none":
        base = target.round_up(multiple)
    return PhaseSizes(compute_phase_sizes(target, base, multiple), base, base, native, from_noise=True)


def validate_base_size(request: Request, multiple: int) -> Size | None:
    """Return --base-size, None if it is not given; raise UsageError if the model or the output does not allow it."""
    base, target = request.base_size, request.size
    if base is None:
        return None
    if base.round_up(multiple) != base:
        reason = f"--base-size {base} does not suit this model: both sides must be multiples of {multiple}."
        raise UsageError(reason, f"Use {base.round_up(multiple)}, for example.", "base_size")
    if aspect_error(base, target) > MAX_ASPECT_ERROR:
        reason = f"--base-size {base} has another aspect ratio than --size {target}."
        raise UsageError(reason, "Choose one with the same aspect ratio: the image would be distorted.", "base_size")
    return base
