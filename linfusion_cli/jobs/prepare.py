"""What a request comes down to on this machine, and what speaks against it. Needs no torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from linfusion_cli import images
from linfusion_cli.device import pick_device, pick_dtype
from linfusion_cli.errors import UsageError, WriteFailed
from linfusion_cli.geometry import Size, base_size, phase_sizes
from linfusion_cli.images.scratch import BYTES_PER_PX
from linfusion_cli.models.families import ModelFacts, read_facts
from linfusion_cli.models.locate import find_linfusion, find_model, find_vae
from linfusion_cli.request import GenerateRequest
from linfusion_cli.units import format_bytes


@dataclass(frozen=True)
class Prepared:
    """A request that nothing speaks against, and what it comes down to on this machine.

    `sizes` are those of the phases from the base up, and `attentions` their attention, linear or original. `linfusion`
    is None where no phase needs it.
    """

    request: GenerateRequest
    format: str
    model: Path
    vae: Path
    linfusion: Path | None
    facts: ModelFacts
    sizes: list[Size]
    attentions: list[str]

    @property
    def is_reduced(self) -> bool:
        """Whether the last phase is resized to the size asked for, which lies below the base, and not cropped to it."""
        return self.sizes[-1] != self.request.size.rounded_up(self.facts.multiple_px)

    @property
    def folder(self) -> Path:
        """Where the file will lie, also when its name is a link; what waits between phases lies there too."""
        return self.request.output.resolve().parent


def prepare(request: GenerateRequest) -> Prepared:
    """Settle what `request` means here; raises UsageError, Unavailable or DataError where it cannot be done."""
    file_format = images.format_for(request.output, request.format)
    if request.download:
        pick_dtype(request.dtype, pick_device(request.device))  # before gigabytes travel to a machine without a card
    model = find_model(request.model, request.download)
    vae = find_vae(request.vae, model, request.download)
    facts = read_facts(model, vae)
    base = base_size(request.size, facts.native_px, facts.multiple_px)
    sizes = phase_sizes(request.size, base, facts.multiple_px)
    attentions = phase_attentions(request, len(sizes))
    linfusion = None
    if "linear" in attentions or request.linfusion not in ("auto", "none"):  # what was named must be there
        linfusion = find_linfusion(request.linfusion, model, facts.family, request.download)
    return Prepared(request, file_format, model, vae, linfusion, facts, sizes, attentions)


def phase_attentions(request: GenerateRequest, phases: int) -> list[str]:
    """The attention of each phase: `auto` is the model's own at the base, where it is faster, and linear above."""
    kinds = request.attentions
    if len(kinds) > phases:
        reason = f"--attention {request.attention!r} names {len(kinds)} phases, and {request.size} has {phases}."
        raise UsageError(reason, "Name as many or fewer; the last holds for all that follow.", "attention")
    if "linear" in kinds and request.linfusion == "none":
        raise UsageError("--attention linear needs LinFusion's weights.", "Leave --linfusion none out.", "attention")
    kinds = kinds + kinds[-1:] * (phases - len(kinds))
    above = "original" if request.linfusion == "none" else "linear"
    automatic = ["original", *[above] * (phases - 1)]
    return [auto if kind == "auto" else kind for kind, auto in zip(kinds, automatic, strict=True)]


def check_disk(prepared: Prepared) -> None:
    """Raise WriteFailed unless the output's disk has room for what the run writes."""
    folder, needed = prepared.folder, disk_bytes(prepared)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WriteFailed(
            f"{folder} has {format_bytes(free)} free, and {prepared.request.size} needs {format_bytes(needed)}.",
            "Free some space, or choose another folder with -o.",
        )


def disk_bytes(prepared: Prepared) -> int:
    """The room the file may need, and the picture that waits between two phases."""
    request = prepared.request
    file_bytes = images.bytes_needed(prepared.format, request.size.pair, request.bits, request.compression)
    return file_bytes + scratch_bytes(prepared)


def scratch_bytes(prepared: Prepared) -> int:
    """The largest picture that waits on disk: the last but one phase, or a base that is reduced to the target."""
    waiting = prepared.sizes if prepared.is_reduced else prepared.sizes[:-1]
    return max((size.area for size in waiting), default=0) * BYTES_PER_PX
