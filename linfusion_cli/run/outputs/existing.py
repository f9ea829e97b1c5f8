"""Find files that an earlier run of the same request wrote, by their content instead of their names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linfusion_cli import images
from linfusion_cli.checkpoint.store import Checkpoint, CheckpointStore, DamagedCheckpoint, IncompatibleCheckpoint
from linfusion_cli.core.errors import LinfusionError
from linfusion_cli.core.fs import is_file
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.report import RunReport
from linfusion_cli.hardware.versions import collect_versions
from linfusion_cli.images.read.source import SourceImage
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.models.files.digest import WeightsFile
from linfusion_cli.run.checkpoint import latents_file
from linfusion_cli.run.checkpoint.compatibility import find_request_changes, to_json_values
from linfusion_cli.run.checkpoint.manager import find_store
from linfusion_cli.run.inputs.provenance import DTYPES_KEY, build_image_metadata, hash_weights, weights_to_report
from linfusion_cli.run.inputs.resolve import resolve_request
from linfusion_cli.run.progress.recorder import RunRecorder
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.request_json import execution_to_json, identity_from_json, request_to_json


@dataclass(frozen=True)
class Provenance:
    """What the files of a run are made from: the request, its weights, and the dtypes of its steps.

    has_checkpoint: True if a checkpoint proves that an earlier run of this request wrote to the same output. Files
        without prompts in their metadata could be of other prompts, so they match only with this proof.
    """

    request: Request
    weights: Sequence[WeightsFile]
    has_checkpoint: bool
    dtypes: Sequence[Mapping[str, Any]] = ()

    def may_replace(self, path: Path, size: Size) -> bool:
        """Return True if the run may replace a file at `path`: with --overwrite, or if the file matches."""
        return self.request.execution.overwrite or self.matches(path, size)

    def matches(self, path: Path, size: Size) -> bool:
        """Return True if `path` is a complete image of this `size`, or latents, with the same provenance.

        Images of phases and previews have the same metadata as the output: only the size distinguishes them.
        """
        if not (self.request.prompt_metadata or self.has_checkpoint):
            return False
        expected = self.as_metadata()
        if path == self.request.execution.keep_latents:
            metadata = latents_file.read_metadata(path)
        else:
            metadata = read_image_metadata(path, size)
            expected = expected if self.request.prompt_metadata else images.remove_prompt_keys(expected)
        return metadata is not None and find_identity(metadata) == find_identity(expected)

    def as_metadata(self) -> dict[str, Any]:
        """Return the metadata of the files, as they are read back."""
        return to_json_values(build_image_metadata(self.request, self.weights, self.dtypes))


@dataclass(frozen=True)
class ExistingOutputs:
    """The files that an earlier run of the same request completed; `report` is set if these are all of them."""

    files: frozenset[Path] = frozenset()
    report: RunReport | None = None


def find_existing(
    request: Request,
    image: SourceImage | None,
    recorder: RunRecorder,
    model_cache: ModelCache,
    keep_complete: bool,
) -> ExistingOutputs:
    """Return the existing outputs, with `keep_complete` or if a checkpoint folder shows that a run was killed.

    Raises the errors of `resolve_request`.
    """
    was_killed = find_store(request).has_folder() and not (request.execution.overwrite or request.execution.fresh)
    if not (keep_complete or was_killed) or not os.path.lexists(request.execution.output):
        return ExistingOutputs()
    resolved = resolve_request(request, image)
    weights = hash_weights(resolved, recorder, model_cache)
    provenance = Provenance(request, weights, read_checkpoint(find_store(request), request) is not None)
    outputs = list_outputs(request)
    files = frozenset(path for path, size in outputs.items() if provenance.matches(path, size))
    if files != outputs.keys():
        return ExistingOutputs(files)
    report = RunReport(
        request_to_json(request),
        execution_to_json(request),
        settings={},
        machine={},
        versions=collect_versions(),
        weights=weights_to_report(weights),
        stages=recorder.stages,
    )
    report.already_complete = True
    return ExistingOutputs(files, report)


def list_outputs(request: Request) -> dict[Path, Size]:
    """Return the files of a complete run and the sizes of their images, without those of --save-phases."""
    preview = Size(*images.compute_preview_size(request.size.pair))
    files = request.execution
    sizes = {files.keep_latents: request.size, files.preview: preview, files.output: request.size}
    return {path: size for path, size in sizes.items() if path is not None}


def remove_checkpoint(request: Request, notify: Callable[[str], None]) -> None:
    """Remove the checkpoint that a killed run of `request` left after completing all files.

    A checkpoint of another request or a damaged one is kept. One of another format is kept with a notice. Raises
    TemporaryFailure if a run is active.
    """
    with (
        images.AtomicFile(
            request.execution.output, overwrite=True
        ),  # adopts an abandoned temporary file and removes it on exit
        find_store(request).lock() as store,
    ):
        if not store.exists() or read_checkpoint(store, request, notify) is not None:
            store.remove()


def read_checkpoint(
    store: CheckpointStore, request: Request, notify: Callable[[str], None] = lambda _: None
) -> Checkpoint | None:
    """Return the checkpoint if it is valid and belongs to `request`; notify about one of another format or version."""
    try:
        checkpoint = store.read()
    except DamagedCheckpoint:
        return None
    except IncompatibleCheckpoint as error:
        notify(
            f"{error.message} {request.execution.output} is already complete: delete the folder if you do not need it."
        )
        return None
    return None if checkpoint is None or find_request_changes(checkpoint, request) else checkpoint


def read_image_metadata(path: Path, size: Size) -> Mapping[str, Any] | None:
    """Return the metadata of the image at `path`; None if it is not a complete image of this size."""
    if not is_file(path):  # reading a pipe would block
        return None
    try:
        info = images.read_info(path)
        return images.verify_image(path).request if (info.width_px, info.height_px) == size.pair else None
    except LinfusionError:
        return None


def find_identity(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what determines the content of a file; None for metadata of an unknown schema or with invalid values."""
    try:
        return identity_from_json({name: value for name, value in metadata.items() if name != DTYPES_KEY})
    except (ValueError, TypeError, LookupError, AttributeError, LinfusionError):
        return None
