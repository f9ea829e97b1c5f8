"""What of a request's files is there already, by what they hold and not by their names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linfusion_cli import images
from linfusion_cli.checkpoint.store import Checkpoint, CheckpointStore, DamagedCheckpoint
from linfusion_cli.core.errors import LinfusionError
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.report import RunReport
from linfusion_cli.core.units import is_file
from linfusion_cli.hardware.device import versions
from linfusion_cli.images.read.source import SourceImage
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.models.files.digest import WeightsFile
from linfusion_cli.run.checkpoint import latents_file
from linfusion_cli.run.checkpoint.manager import NON_IDENTITY_FIELDS, as_json, find_request_changes, find_store
from linfusion_cli.run.inputs.provenance import DTYPES, hash_weights, made_with, to_json
from linfusion_cli.run.inputs.resolve import resolve_request
from linfusion_cli.run.progress.recorder import RunRecorder
from linfusion_cli.settings.request import ImageRequest


@dataclass(frozen=True)
class Provenance:
    """What a run makes its files of: a request and weights; `dtypes` are those in which steps were computed.

    A file that names no prompts could be of others, unless it is `proven` by a journal that a run of this request was
    at work here.
    """

    request: ImageRequest
    weights: Sequence[WeightsFile]
    proven: bool
    dtypes: Sequence[Mapping[str, Any]] = ()

    def may_go(self, path: Path, size: Size) -> bool:
        """Whether a file at `path` may be replaced: that is wished, or it is the very one that will be made."""
        return self.request.overwrite or self.made(path, size)

    def made(self, path: Path, size: Size) -> bool:
        """Whether there is a whole picture of this `size`, or latents, at `path` that was made of these.

        Pictures of phases and previews say the same of themselves as the picture does: only sizes tell them apart.
        """
        if not (self.request.prompt_metadata or self.proven):
            return False
        if path == self.request.keep_latents:
            found, expected = latents_file.made_with(path), self.told
        else:
            found = read_image_request(path, size)
            expected = self.told if self.request.prompt_metadata else images.remove_prompts(self.told)
        return found is not None and identity_fields(found) == identity_fields(expected)

    @property
    def told(self) -> dict[str, Any]:
        """What a file says that is made of these, as it is read back."""
        return as_json(made_with(self.request, self.weights, self.dtypes))


@dataclass(frozen=True)
class ExistingOutputs:
    """The files that a run of this very request has made; where those are all of them, the `report` that says so."""

    files: frozenset[Path] = frozenset()
    report: RunReport | None = None


def find_existing(
    request: ImageRequest,
    image: SourceImage | None,
    recorder: RunRecorder,
    model_cache: ModelCache,
    keep_complete: bool,
) -> ExistingOutputs:
    """What there is, which is looked at with `keep_complete`, or where a run was killed: its journal is still there.

    Raises as `prepare` does.
    """
    killed = find_store(request).has_folder() and not (request.overwrite or request.fresh)
    if not (keep_complete or killed) or not os.path.lexists(request.output):
        return ExistingOutputs()
    resolved = resolve_request(request, image)
    weights = hash_weights(resolved, recorder, model_cache)
    making = Provenance(request, weights, read_checkpoint(find_store(request), request) is not None)
    wanted = list_outputs(request)
    found = frozenset(path for path, size in wanted.items() if making.made(path, size))
    if found != wanted.keys():
        return ExistingOutputs(found)
    report = RunReport(request.to_json(), {}, {}, versions(), {}, to_json(weights), recorder.stages)
    report.already_complete = True
    return ExistingOutputs(found, report)


def list_outputs(request: ImageRequest) -> dict[Path, Size]:
    """What there is when a run is over, but for the pictures of phases, and the size of each picture."""
    preview = Size(*images.preview_size(request.size.pair))
    files = {request.keep_latents: request.size, request.preview: preview, request.output: request.size}
    return {path: size for path, size in files.items() if path is not None}


def remove_checkpoint(request: ImageRequest) -> None:
    """The files of `request` are complete: what a killed run of it has left goes. Raises TryAgain where one goes on."""
    with (
        images.AtomicFile(request.output, overwrite=True),  # takes over a temporary name, which goes
        find_store(request).held() as store,
    ):
        if not store.exists() or read_checkpoint(store, request) is not None:
            store.remove()


def read_checkpoint(store: CheckpointStore, request: ImageRequest) -> Checkpoint | None:
    """What `journal` says, if it is whole and of this request."""
    try:
        entry = store.read()
    except DamagedCheckpoint:
        return None
    return None if entry is None or find_request_changes(entry, request) else entry


def read_image_request(path: Path, size: Size) -> Mapping[str, Any] | None:
    """What the picture at `path` says it was made with; None unless it is whole, and of this size."""
    if not is_file(path):  # a pipe would be waited for
        return None
    try:
        found = images.read_info(path)
        return images.verify_image(path).request if (found.width_px, found.height_px) == size.pair else None
    except LinfusionError:
        return None


def identity_fields(told: Mapping[str, Any]) -> dict[str, Any]:
    """What of that decides a file."""
    return {name: value for name, value in told.items() if name not in (*NON_IDENTITY_FIELDS, DTYPES)}
