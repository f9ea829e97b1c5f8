"""What a request comes down to on this machine, and what speaks against it. Needs no torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from linfusion_cli import images
from linfusion_cli.core.errors import UsageError, WriteFailed
from linfusion_cli.core.fs import check_distinct
from linfusion_cli.core.geometry import MAX_ASPECT_ERROR, Size, aspect_error, base_size, phase_sizes, upscale_sizes
from linfusion_cli.core.units import format_bytes
from linfusion_cli.hardware.device import pick_device, pick_dtype
from linfusion_cli.images.process.scratch import BYTES_PER_PX
from linfusion_cli.images.read.source import SourceImage
from linfusion_cli.models.families.facts import ModelFacts, read_facts
from linfusion_cli.models.files.parts import Model, Part
from linfusion_cli.models.locate.base import base_here, find_base
from linfusion_cli.models.locate.files import find_inversion, find_lora, split_token, split_weight
from linfusion_cli.models.locate.ip_adapter import Adapter
from linfusion_cli.models.locate.model import find_linfusion, find_model, find_vae
from linfusion_cli.run.inputs.controlnets import ControlNetSpecs, find_controlnets
from linfusion_cli.run.inputs.ip_adapters import find_ip_adapters
from linfusion_cli.run.inputs.phase_files import phase_path
from linfusion_cli.run.inputs.prompt_checks import check_prompts
from linfusion_cli.sampling.phases import Phase, PhaseSizes, build_phases
from linfusion_cli.settings.request import ImageRequest

JOURNAL_COPIES = 9  # one of what a phase began with; latents and three of a scheduler, old and new


@dataclass(frozen=True)
class ResolvedRequest:
    """A request that nothing speaks against, and what it comes down to on this machine.

    `picture` is what grows, None where the base comes from noise. `linfusion` is None where no phase needs it;
    `base`, the folder of the UNet that these were made for, where they are taken as they are. `loras` are files with
    their weights, `inversions` with their tokens, None for a file's own.
    """

    request: ImageRequest
    format: str
    image: SourceImage | None
    model: Model
    vae: Part
    linfusion: Path | None
    base: Path | None
    loras: list[tuple[Path, float]]
    inversions: list[tuple[Path, str | None]]
    adapters: list[Adapter]
    facts: ModelFacts
    phases: list[Phase]
    controlnets: ControlNetSpecs

    @property
    def is_downscaled(self) -> bool:
        """Whether the last phase is resized to the size asked for, which lies below the base, and not cropped to it."""
        return self.phases[-1].size != self.request.size.round_up(self.facts.multiple_px)

    @property
    def model_is_base(self) -> bool:
        """Whether the model is itself the one that LinFusion's weights were made for."""
        return self.model.file is None and self.base == self.model.part("unet").folder

    def visible_size(self, phase: Phase) -> Size:
        """What of `phase` will be seen: all of it, or of the last what is left when it is cropped."""
        return self.request.size if phase is self.phases[-1] and not self.is_downscaled else phase.size

    @property
    def image_size(self) -> Size | None:
        return None if self.image is None else self.image.size

    @property
    def folder(self) -> Path:
        """Where the file will lie, also when its name is a link; what waits between phases lies there too."""
        return self.request.output.resolve().parent


def resolve_request(request: ImageRequest, image: SourceImage | None = None) -> ResolvedRequest:
    """Settle what `request` means here; raises UsageError, Unavailable or DataError where it cannot be done."""
    check_prompts(request)
    file_format = images.format_for(request.output, request.format)
    if request.download:
        pick_dtype(request.dtype, pick_device(request.device))  # before gigabytes travel to a machine without a card
    model = find_model(request.model, request.download)
    vae = find_vae(request.vae, model, request.download)
    loras = [(find_lora(name, request.download), weight) for name, weight in map(split_weight, request.lora)]
    inversions = [
        (find_inversion(name, request.download), token) for name, token in map(split_token, request.textual_inversion)
    ]
    facts = read_facts(model, vae)
    facts = facts if request.prediction_type == "auto" else facts.predicting(request.prediction_type)
    adapters = find_ip_adapters(request, facts.family)
    phases = build_phases(request, choose_sizes(request, facts, image))
    controlnets = find_controlnets(request, model, len(phases))
    linfusion = base = None
    used = any(phase.attention == "linear" for phase in phases)
    if used or request.linfusion not in ("auto", "none"):  # what was named must be there
        linfusion = find_linfusion(request.linfusion, model, facts.family, request.download)
    if used and linfusion is not None:
        base = find_merge_base(request, model, linfusion, facts.family)
    resolved = ResolvedRequest(
        request=request,
        format=file_format,
        image=image,
        model=model,
        vae=vae,
        linfusion=linfusion,
        base=base,
        loras=loras,
        inversions=inversions,
        adapters=adapters,
        facts=facts,
        phases=phases,
        controlnets=controlnets,
    )
    check_outputs(resolved)
    return resolved


def check_outputs(resolved: ResolvedRequest) -> None:
    """Raise UsageError where two of the files that the run writes would be one."""
    request = resolved.request
    files = {"--output": request.output, "--preview": request.preview, "--keep-latents": request.keep_latents}
    sizes = saved_sizes(resolved) if request.save_phases else []
    phases = {f"the {size} phase of --save-phases": phase_path(request.output, size) for size in sizes}
    check_distinct(files | phases)


def find_merge_base(request: ImageRequest, model: Model, linfusion: Path, family: str) -> Path | None:
    """The folder of the UNet from which `model` was tuned, where what that changed goes into LinFusion's weights.

    `auto` has it so for published weights where the base is here, as others may have been made for the model itself,
    and for a base that was named.
    """
    named = request.linfusion_merge == "auto" and request.linfusion_base != "auto"
    if request.linfusion_merge == "delta" or named:
        return find_base(request.linfusion_base, model, linfusion, family, request.download)
    if request.linfusion_merge != "auto" or request.linfusion != "auto":
        return None
    return base_here(model, linfusion, family)


def choose_sizes(request: ImageRequest, facts: ModelFacts, image: SourceImage | None) -> PhaseSizes:
    """The sizes of the request's ladder, from the base or from a picture up."""
    target, multiple = request.size, facts.multiple_px
    native = base_size(target, facts.native_px, multiple)
    base = check_base_size(request, multiple) or native
    if image is not None:
        return PhaseSizes(upscale_sizes(target, image.size, base, multiple), image.size, base, native, from_noise=False)
    if request.upscaler == "none":
        base = target.round_up(multiple)
    return PhaseSizes(phase_sizes(target, base, multiple), base, base, native, from_noise=True)


def check_base_size(request: ImageRequest, multiple: int) -> Size | None:
    """--base-size, if it is given; raises UsageError where it is none for this model or this picture."""
    base, target = request.base_size, request.size
    if base is None:
        return None
    if base.round_up(multiple) != base:
        reason = f"--base-size {base} is not possible with this model."
        raise UsageError(reason, f"Use multiples of {multiple}.", "base_size")
    if aspect_error(base, target) > MAX_ASPECT_ERROR:
        reason = f"--base-size {base} has not the proportions of {target}."
        raise UsageError(reason, "Choose one that has: the picture would be stretched.", "base_size")
    return base


def check_disk(resolved: ResolvedRequest) -> None:
    """Raise WriteFailed unless the output's disk has room for what the run writes."""
    folder, needed = resolved.folder, disk_bytes(resolved)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WriteFailed(
            f"{folder} has {format_bytes(free)} free, and {resolved.request.size} needs {format_bytes(needed)}.",
            "Free some space, or choose another folder with -o.",
        )


def disk_bytes(resolved: ResolvedRequest) -> int:
    """The room the files may need, the picture that waits between two phases, and the journal."""
    request = resolved.request
    sizes = [request.size, *(saved_sizes(resolved) if request.save_phases else [])]
    needs = [images.bytes_needed(resolved.format, size.pair, request.bits, request.compression) for size in sizes]
    return sum(needs) + scratch_bytes(resolved) + journal_bytes(resolved)


def journal_bytes(resolved: ResolvedRequest) -> int:
    """What the journal may take: the latents a phase began with and those it reached, with what its scheduler keeps,
    twice while a state is replaced."""
    facts, size = resolved.facts, resolved.phases[-1].size
    return JOURNAL_COPIES * 4 * facts.latent_channels * size.divide(facts.vae_factor).area


def saved_sizes(resolved: ResolvedRequest) -> list[Size]:
    """The pictures that --save-phases keeps: all but the last, which is the output unless that is reduced from it."""
    sizes = [phase.size for phase in resolved.phases]
    return sizes if resolved.is_downscaled else sizes[:-1]


def scratch_bytes(resolved: ResolvedRequest) -> int:
    """The largest picture that waits on disk: between phases, before the first, of a control, or to be reduced."""
    waiting = [size.area for size in saved_sizes(resolved)]
    if resolved.image_size is not None:
        waiting.append(resolved.image_size.area)
    waiting.append(resolved.controlnets.largest_px)
    return max(waiting) * BYTES_PER_PX
