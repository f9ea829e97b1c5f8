"""Whether a picture need not be made: its file is there, whole, and of the same request, weights and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from linfusion_cli import images
from linfusion_cli.device import versions
from linfusion_cli.errors import LinfusionError
from linfusion_cli.images.source import SourcePicture
from linfusion_cli.jobs.outputs import picture_info
from linfusion_cli.jobs.prepare import prepare
from linfusion_cli.jobs.record import Recorder
from linfusion_cli.jobs.shelf import Shelf
from linfusion_cli.jobs.weights import hashed_weights, to_json
from linfusion_cli.models.digest import WeightsFile
from linfusion_cli.report import RunReport
from linfusion_cli.request import PictureRequest
from linfusion_cli.units import is_file

# What decides neither the picture nor how its file is written; the output is the file that is looked at.
BESIDE = (
    "output",
    "preview",
    "overwrite",
    "download",
    "ram",
    "vram",
    "fresh",
    "checkpoint_every",
    "keep_latents",
)


def already_made(
    request: PictureRequest,
    picture: SourcePicture | None,
    origins: Mapping[str, str],
    recorder: Recorder,
    shelf: Shelf,
) -> RunReport | None:
    """The report of a run that has nothing to do, None where there is something; raises as `prepare` does."""
    if not is_file(request.output):
        return None
    prepared = prepare(request, picture)
    weights = hashed_weights(prepared, recorder, shelf)
    if not is_complete(request, weights):
        return None
    report = RunReport(request.to_json(), dict(origins), {}, versions(), {}, to_json(weights), recorder.stages)
    report.output, report.size, report.format = str(request.output), request.size, prepared.format
    report.file_bytes, report.already_complete = request.output.stat().st_size, True
    return report


def is_complete(request: PictureRequest, weights: Sequence[WeightsFile]) -> bool:
    """Whether the output is a whole picture that says it was made from this request with these weights."""
    try:
        found = images.read_info(request.output)
    except LinfusionError:
        return False
    wanted = json.loads(images.request_json(picture_info(request, request.size, weights)))
    return found.request is not None and decisive(found.request) == decisive(wanted)


def decisive(request: Mapping[str, Any]) -> dict[str, Any]:
    """What of a request, as a file has it, decides that file."""
    return {name: value for name, value in request.items() if name not in BESIDE}
