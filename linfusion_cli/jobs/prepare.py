"""What a request comes down to on this machine, and what speaks against it. Needs no torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from linfusion_cli import images
from linfusion_cli.device import pick_device, pick_dtype
from linfusion_cli.errors import WriteFailed
from linfusion_cli.geometry import Size, base_size, phase_sizes
from linfusion_cli.jobs.outputs import BITS
from linfusion_cli.models.families import ModelFacts, read_facts
from linfusion_cli.models.locate import find_linfusion, find_model
from linfusion_cli.request import GenerateRequest
from linfusion_cli.units import format_bytes

SCRATCH_BYTES_PER_PX = 6  # three channels of 16 bits


@dataclass(frozen=True)
class Prepared:
    """A request that nothing speaks against, and what it comes down to on this machine.

    `sizes` are those of the phases from the base up; `linfusion` is None for the model's own attention.
    """

    request: GenerateRequest
    format: str
    model: Path
    linfusion: Path | None
    facts: ModelFacts
    sizes: list[Size]

    @property
    def is_reduced(self) -> bool:
        """Whether the last phase is resized to the size asked for, which lies below the base, and not cropped to it."""
        return self.sizes[-1] != self.request.size.rounded_up(self.facts.multiple_px)

    @property
    def folder(self) -> Path:
        """Where the file will lie, also when its name is a link; what waits between phases lies there too."""
        return self.request.output.resolve().parent


def prepare(request: GenerateRequest) -> Prepared:
    """Settle what `request` means here; raises Unavailable, DataError or WriteFailed where it cannot be done."""
    file_format = images.format_for(request.output, request.format)
    if request.download:
        pick_dtype(request.dtype, pick_device(request.device))  # before gigabytes travel to a machine without a card
    model = find_model(request.model, request.download)
    facts = read_facts(model)
    linfusion = find_linfusion(request.linfusion, model, facts.family, request.download)
    base = base_size(request.size, facts.native_px, facts.multiple_px)
    prepared = Prepared(
        request, file_format, model, linfusion, facts, phase_sizes(request.size, base, facts.multiple_px)
    )
    check_disk(prepared)
    return prepared


def check_disk(prepared: Prepared) -> None:
    """Raise WriteFailed unless the output's disk has room for the file and for the picture between two phases."""
    request = prepared.request
    folder = prepared.folder
    file_bytes = images.bytes_needed(prepared.format, request.size.pair, BITS, request.compression)
    needed = file_bytes + scratch_bytes(prepared)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WriteFailed(
            f"{folder} has {format_bytes(free)} free, and {request.size} needs {format_bytes(needed)}.",
            "Free some space, or choose another folder with -o.",
        )


def scratch_bytes(prepared: Prepared) -> int:
    """The largest picture that waits on disk: the last but one phase, or a base that is reduced to the target."""
    waiting = prepared.sizes if prepared.is_reduced else prepared.sizes[:-1]
    return max((size.area for size in waiting), default=0) * SCRATCH_BYTES_PER_PX
