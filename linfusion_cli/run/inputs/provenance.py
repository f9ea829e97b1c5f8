"""Hash the files that a run reads, for its report and the metadata of its image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from linfusion_cli.models.cache import ModelCache
from linfusion_cli.models.files.digest import WeightsFile, hash_files
from linfusion_cli.models.files.layout import PARTS, find_weights_files
from linfusion_cli.models.locate.model import LINFUSION_WEIGHTS
from linfusion_cli.run.inputs.resolve import ResolvedRequest
from linfusion_cli.run.progress.recorder import RunRecorder
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.request_json import request_to_json

DTYPES_KEY = "dtypes"  # in metadata and checkpoints: the dtypes in which steps were computed
MODEL_USE = "model"  # the use of a file that holds a whole model


def hash_weights(resolved: ResolvedRequest, recorder: RunRecorder, model_cache: ModelCache) -> list[WeightsFile]:
    """Return all weights and input images with their SHA-256.

    Hashing reads gigabytes, which the page cache then holds for loading. `model_cache` keeps hashes between jobs.
    """
    with recorder.stage("resolve", None, 1, "hashes"):
        return hash_files(list_weights(resolved), model_cache.digests)


def list_weights(resolved: ResolvedRequest) -> Iterator[tuple[str, Path]]:
    """Yield the use and the path of every file; raise DataError if a shard is missing."""
    model = resolved.model
    if model.file is not None:
        yield MODEL_USE, model.file
    else:
        for name in (part for part in PARTS if part != "vae" and (model.folder / part).is_dir()):
            yield from ((name, file) for file in model.get_part(name).weights)
    yield from (("vae", file) for file in resolved.vae.weights)
    if resolved.linfusion_folder is not None:
        yield "linfusion", resolved.linfusion_folder / LINFUSION_WEIGHTS
    yield from (("lora", file) for file, _ in resolved.loras)
    if resolved.linfusion_base is not None:
        yield from (("linfusion_base", file) for file in find_weights_files(resolved.linfusion_base))
    for adapter in resolved.ip_adapters:
        yield "ip_adapter", adapter.weights.file
        yield from (("image_encoder", file) for file in find_weights_files(adapter.encoder))
    yield from (("textual_inversion", file) for file, _ in resolved.textual_inversions)
    for control in resolved.controlnets.specs:
        yield from (("controlnet", file) for file in find_weights_files(control.folder))
    yield from list_images(resolved)


def list_images(resolved: ResolvedRequest) -> Iterator[tuple[str, Path]]:
    """Yield the use and the path of every input image: other content under the same name makes another request."""
    if resolved.source_image is not None:
        yield "image", resolved.source_image.path
    yield from (("ip_image", adapter.image.path) for adapter in resolved.ip_adapters)
    yield from (("control_image", control.image.path) for control in resolved.controlnets.specs)


def find_model_hash(weights: Sequence[WeightsFile]) -> str:
    """Return the hash that identifies the model: of its single file, or of the first file of its UNet."""
    return next((file.sha256 for file in weights if file.use in (MODEL_USE, "unet")), "")


def weights_to_metadata(weights: Sequence[WeightsFile]) -> list[dict[str, str]]:
    """Return `weights` in the format of image metadata."""
    return [{"file": file.name, "sha256": file.sha256} for file in weights]


def build_image_metadata(
    request: Request, weights: Sequence[WeightsFile], dtypes: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what reproduces the image: the request, its weights, and the dtypes of its steps."""
    return request_to_json(request) | {"weights": weights_to_metadata(weights), DTYPES_KEY: list(dtypes)}


def weights_to_report(weights: Sequence[WeightsFile]) -> list[dict[str, Any]]:
    """Return `weights` in the format of a report."""
    return [{"use": file.use, "path": str(file.path), "bytes": file.bytes, "sha256": file.sha256} for file in weights]
