"""The weights that a run reads, hashed before it begins: what its report and its picture say of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from linfusion_cli.models.cache import ModelCache
from linfusion_cli.models.files.digest import WeightsFile, digested
from linfusion_cli.models.files.parts import PARTS, weights_files
from linfusion_cli.models.locate.model import LINFUSION_WEIGHTS
from linfusion_cli.run.inputs.resolve import ResolvedRequest
from linfusion_cli.run.progress.recorder import RunRecorder
from linfusion_cli.settings.request import ImageRequest

DTYPES = "dtypes"  # of metadata and checkpoints: the dtypes in which steps were computed
WHOLE = "model"  # the use of a file that holds a whole model


def hash_weights(resolved: ResolvedRequest, recorder: RunRecorder, model_cache: ModelCache) -> list[WeightsFile]:
    """All of them, with the time that it takes recorded: gigabytes are read, which loading then finds in memory.

    `shelf` has the hashes of the jobs before.
    """
    with recorder.stage("weights", "hash", None, 1, "hashes"):
        return digested(list_weights(resolved), model_cache.digests)


def list_weights(resolved: ResolvedRequest) -> Iterator[tuple[str, Path]]:
    """Use and path of every file; raises DataError where a shard is missing."""
    model = resolved.model
    if model.file is not None:
        yield WHOLE, model.file
    else:
        for name in (part for part in PARTS if part != "vae" and (model.folder / part).is_dir()):
            yield from ((name, file) for file in model.part(name).weights)
    yield from (("vae", file) for file in resolved.vae.weights)
    if resolved.linfusion is not None:
        yield "linfusion", resolved.linfusion / LINFUSION_WEIGHTS
    yield from (("lora", file) for file, _ in resolved.loras)
    if resolved.base is not None:
        yield from (("linfusion_base", file) for file in weights_files(resolved.base))
    for adapter in resolved.adapters:
        yield "ip_adapter", adapter.weights.file
        yield from (("image_encoder", file) for file in weights_files(adapter.encoder))
    yield from (("textual_inversion", file) for file, _ in resolved.inversions)
    for control in resolved.controlnets.found:
        yield from (("controlnet", file) for file in weights_files(control.folder))
    yield from images_read(resolved)


def images_read(resolved: ResolvedRequest) -> Iterator[tuple[str, Path]]:
    """Use and path of every picture that goes in: other pixels under the same name are another request."""
    if resolved.image is not None:
        yield "image", resolved.image.path
    yield from (("ip_image", adapter.image.path) for adapter in resolved.adapters)
    yield from (("control_image", control.image.path) for control in resolved.controlnets.found)


def main_hash(weights: Sequence[WeightsFile]) -> str:
    """What stands for the checkpoint where there is room for one hash: its file's, or its UNet's first."""
    return next((file.sha256 for file in weights if file.use in (WHOLE, "unet")), "")


def name_weights(weights: Sequence[WeightsFile]) -> list[dict[str, str]]:
    """As a picture's metadata have it."""
    return [{"file": file.name, "sha256": file.sha256} for file in weights]


def made_with(
    request: ImageRequest, weights: Sequence[WeightsFile], dtypes: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The full request, its weights, and the dtypes that steps were computed in: what makes the same picture again."""
    return request.to_json() | {"weights": name_weights(weights), DTYPES: list(dtypes)}


def to_json(weights: Sequence[WeightsFile]) -> list[dict[str, Any]]:
    """As a report has it."""
    return [{"use": file.use, "path": str(file.path), "bytes": file.bytes, "sha256": file.sha256} for file in weights]
