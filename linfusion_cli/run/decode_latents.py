"""The pipeline of `linfusion decode`: decode saved latents into an image file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from linfusion_cli import settings
from linfusion_cli.core.errors import DataError, LinfusionError, UsageError
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
from linfusion_cli.run.progress.time_limit import explain_time_limit
from linfusion_cli.settings.checks import list_errors
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.request_json import values_from_json
from linfusion_cli.settings.table import SETTINGS, assemble_request, flatten_request

VAE_USE = "vae"


def decode(
    saved_latents: SavedLatents, request: Request, origins: Mapping[str, str], observer: Observer = ignore_event
) -> RunReport:
    """Decode the latents into the output of `request`. Raise a LinfusionError on failure; no partial file remains."""
    started = time.perf_counter()
    recorder = RunRecorder(observer)
    with explain_time_limit(recorder), reserve_output(request, ()) as file:
        with recorder.stage("resolve", None, 1, "request"):
            resolved = keep_last_phase(resolve_request(reset_unused_settings(request)), saved_latents)
            check_disk_space(resolved)
        with recorder.stage("plan", None, 1, "plan"):
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


def reset_unused_settings(request: Request) -> Request:
    """Return the request with defaults for the settings that decoding does not use: their files need not exist."""
    defaults = {name: setting.default for name, setting in SETTINGS.items() if not setting.used_by_decode}
    # The original attention needs no LinFusion weights.
    return assemble_request(flatten_request(request) | defaults | {"attention": ("original",)})


def build_decode_request(saved_latents: SavedLatents, given: Mapping[str, Any]) -> tuple[dict[str, str], Request]:
    """Return the origin of each setting and the request that made the latents, overridden by the `given` settings.

    Raise DataError if the metadata of the latents contain no valid request, UsageError if a given setting is invalid.
    """
    flags = settings.raise_errors(settings.read_flag_layer(given))
    try:
        stored = settings.Layer(f"latents {saved_latents.path}", read_settings(saved_latents))
        merged = settings.merge([flags, stored])
        return merged.origins(), settings.build_request(merged)
    except (LookupError, ValueError, TypeError, AttributeError, UsageError) as error:
        if isinstance(error, UsageError) and any(is_given(one, flags) for one in list_errors(error)):
            raise
        reason = f"{saved_latents.path} has no valid request in its metadata ({error})."
        raise DataError(reason, "Generate it again with --keep-latents.") from error


def is_given(error: LinfusionError, flags: settings.Layer) -> bool:
    """Return whether the error is about an option that was given."""
    return getattr(error, "setting", None) in flags.values


def read_settings(saved_latents: SavedLatents) -> dict[str, Any]:
    """Return the settings in the metadata of the latents, without those of other output files."""
    values = values_from_json(saved_latents.metadata)
    values |= {"save_phases": False, "format": None, "output": saved_latents.path.with_suffix(".tif")}
    return {name: value for name, value in values.items() if value is not None}
