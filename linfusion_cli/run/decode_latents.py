"""The pipeline of `linfusion decode`: decode saved latents into an image file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from linfusion_cli import settings
from linfusion_cli.core.errors import DataError, UsageError
from linfusion_cli.core.events import Observer, ignore_event
from linfusion_cli.core.report import RunReport
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.models.files.digest import WeightsFile
from linfusion_cli.run.checkpoint.latents_file import SavedLatents
from linfusion_cli.run.checkpoint.manager import CheckpointManager, find_store
from linfusion_cli.run.inputs.disk import check_disk_space
from linfusion_cli.run.inputs.provenance import DTYPES_KEY, hash_weights
from linfusion_cli.run.inputs.resolve import ResolvedRequest, resolve_request
from linfusion_cli.run.outputs.existing import Provenance
from linfusion_cli.run.outputs.open import open_outputs, reserve_output
from linfusion_cli.run.outputs.report import complete_report
from linfusion_cli.run.progress.recorder import RunRecorder
from linfusion_cli.settings.request import GenerateRequest, ImageRequest, UpscaleRequest

VAE_USE = "vae"
# Decoding does not use these settings, so their files do not have to exist.
DECODE_DEFAULTS: dict[str, Any] = {
    "linfusion": "none",
    "linfusion_merge": "auto",
    "linfusion_base": "auto",
    "lora": (),
    "textual_inversion": (),
    "ip_adapter": (),
    "ip_image": (),
    "ip_scale": (1.0,),
    "controlnet": (),
    "control_image": (),
    "control_scale": (1.0,),
    "control_type": (),
    "control_phases": ("base",),
    "attention": ("auto",),
    "strict_prompt": False,
}


def decode(
    saved_latents: SavedLatents, request: ImageRequest, origins: Mapping[str, str], observer: Observer = ignore_event
) -> RunReport:
    """Decode the latents into the output of `request`. Raise a LinfusionError on failure; no partial file remains."""
    started = time.perf_counter()
    recorder = RunRecorder(observer)
    with reserve_output(request, ()) as file:
        with recorder.stage("resolve", "resolve", None, 1, "request"):
            resolved = keep_last_phase(resolve_request(replace(request, **DECODE_DEFAULTS)), saved_latents)
            check_disk_space(resolved)
        with recorder.stage("plan", "plan", None, 1, "plan"):
            from linfusion_cli.run.stages import load, write  # importing torch and diffusers takes seconds

            model_cache, checkpoints = ModelCache(enabled=False), CheckpointManager(find_store(request), None, request)
            run = load.start_run(resolved, recorder, checkpoints, model_cache)
        vae_weights = [weights for weights in hash_weights(resolved, recorder, model_cache) if weights.use == VAE_USE]
        report = run.build_report(request, origins, vae_weights)
        report.dtypes = list(saved_latents.metadata[DTYPES_KEY])
        provenance = Provenance(
            request, replace_vae_weights(saved_latents, vae_weights), has_checkpoint=False, dtypes=report.dtypes
        )
        with open_outputs(file, provenance) as sink:
            vae = load.prepare_vae(run)
            write.write_output(run, vae, saved_latents.read(), sink)
    return complete_report(report, request, started)


def keep_last_phase(resolved: ResolvedRequest, saved_latents: SavedLatents) -> ResolvedRequest:
    """Return the request with only its last phase, without steps. Raise DataError if the latents do not fit it."""
    last, facts = resolved.phases[-1], resolved.facts
    size_lat = last.size.divide(facts.vae_factor)
    shape = (1, facts.latent_channels, size_lat.height, size_lat.width)
    if (last.size, saved_latents.shape) != (saved_latents.phase_size, shape):
        request = resolved.request
        reason = f"The latents in {saved_latents.path} do not fit {request.size} px and the model {request.model}."
        raise DataError(reason, "Use the model that made them: it has changed, or --model is of another family.")
    return replace(resolved, phases=[replace(last, index=0, active_steps=0)])


def replace_vae_weights(saved_latents: SavedLatents, vae: Sequence[WeightsFile]) -> list[WeightsFile]:
    """Return the weights in the metadata of the latents, with those of the VAE replaced by `vae`."""
    files = [(*entry["file"].split("/", 1), entry["sha256"]) for entry in saved_latents.metadata["weights"]]
    others = [WeightsFile(use, Path(name), 0, sha256) for use, name, sha256 in files if use != VAE_USE]
    before = next((i for i, (use, *_) in enumerate(files) if use == VAE_USE), len(others))
    return [*others[:before], *vae, *others[before:]]


def build_decode_request(saved_latents: SavedLatents, given: Mapping[str, Any]) -> tuple[dict[str, str], ImageRequest]:
    """Return the origin of each setting and the request that made the latents, overridden by the `given` settings.

    Raise DataError if the metadata of the latents contain no valid request, UsageError if a given setting is invalid.
    """
    kind = UpscaleRequest if saved_latents.metadata.get("image") else GenerateRequest
    try:
        stored = settings.Layer(f"latents {saved_latents.path}", read_settings(saved_latents, kind))
        merged = settings.merge([settings.build_flag_layer(given), stored])
        return merged.origins(kind), settings.build_request(merged, kind)
    except (LookupError, ValueError, TypeError, AttributeError, UsageError) as error:
        if given.get(getattr(error, "setting", None) or "") is not None:
            raise
        reason = f"{saved_latents.path} has no valid request in its metadata ({error})."
        raise DataError(reason, "Generate it again with --keep-latents.") from error


def read_settings(saved_latents: SavedLatents, kind: type[ImageRequest]) -> dict[str, Any]:
    """Return the settings in the metadata of the latents, without those of other output files."""
    metadata, parsers = saved_latents.metadata, settings.PARSERS
    values = {name: parsers[name](metadata[name]) for name in parsers if metadata.get(name) is not None}
    values |= {"image": Path(metadata["image"])} if kind is UpscaleRequest else {}
    return values | {"save_phases": False, "format": None, "output": saved_latents.path.with_suffix(".tif")}
