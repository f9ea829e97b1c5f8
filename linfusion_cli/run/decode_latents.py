"""From kept latents to a file: what `linfusion decode` does."""

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
from linfusion_cli.hardware.device import describe, versions
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.models.files.digest import WeightsFile
from linfusion_cli.run.checkpoint.latents_file import SavedLatents
from linfusion_cli.run.checkpoint.manager import CheckpointManager, find_store
from linfusion_cli.run.inputs.provenance import DTYPES, hash_weights, to_json
from linfusion_cli.run.inputs.resolve import ResolvedRequest, check_disk, resolve_request
from linfusion_cli.run.outputs.existing import Provenance
from linfusion_cli.run.outputs.open import open_outputs, reserve_output
from linfusion_cli.run.outputs.report import complete_report
from linfusion_cli.run.progress.recorder import RunRecorder
from linfusion_cli.settings.request import GenerateRequest, ImageRequest, UpscaleRequest

VAE_USE = "vae"
# What a decoding has no part of: where such files lie today is no matter.
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
    kept: SavedLatents, request: ImageRequest, origins: Mapping[str, str], observer: Observer = ignore_event
) -> RunReport:
    """Make the file of `request` from the `kept` latents; raises a LinfusionError with nothing left behind."""
    started = time.perf_counter()
    recorder = RunRecorder(observer)
    with reserve_output(request, ()) as file:
        with recorder.stage("start", "load", None, 1, "start"):
            resolved = keep_last_phase(resolve_request(replace(request, **DECODE_DEFAULTS)), kept)
            check_disk(resolved)
            from linfusion_cli.run.stages import convert, load  # torch and diffusers take seconds to import

            model_cache, checkpoints = ModelCache(keeps=False), CheckpointManager(find_store(request), None, request)
            run = load.start_run(resolved, recorder, checkpoints, model_cache)
        machine, plan = describe(run.device), run.plan.to_json()
        read = [weights for weights in hash_weights(resolved, recorder, model_cache) if weights.use == VAE_USE]
        report = RunReport(request.to_json(), dict(origins), machine, versions(), plan, to_json(read), recorder.stages)
        report.dtypes = list(kept.made_with[DTYPES])
        making = Provenance(request, replace_vae_weights(kept, read), proven=False, dtypes=report.dtypes)
        with open_outputs(file, making) as sink:
            vae = load.load_decoder(run)
            convert.write_output(run, vae, kept.read(), sink)
    return complete_report(report, request, started)


def keep_last_phase(resolved: ResolvedRequest, kept: SavedLatents) -> ResolvedRequest:
    """`prepared` with the last phase alone, which has no steps; raises DataError where the latents are not its own."""
    last, facts = resolved.phases[-1], resolved.facts
    size_lat = last.size.divide(facts.vae_factor)
    if (last.size, kept.shape) != (kept.phase_size, (1, facts.latent_channels, size_lat.height, size_lat.width)):
        reason = f"{kept.path} is no picture of {resolved.request.size} by {resolved.request.model}."
        raise DataError(reason, "Its model has changed since, or --model names another kind.")
    return replace(resolved, phases=[replace(last, index=0, count=0)])


def replace_vae_weights(kept: SavedLatents, vae: Sequence[WeightsFile]) -> list[WeightsFile]:
    """The weights that the latents were made with, as far as their metadata tell, with the `vae` that decodes them."""
    files = [(*entry["file"].split("/", 1), entry["sha256"]) for entry in kept.made_with["weights"]]
    others = [WeightsFile(use, Path(name), 0, sha256) for use, name, sha256 in files if use != VAE_USE]
    before = next((i for i, (use, *_) in enumerate(files) if use == VAE_USE), len(others))
    return [*others[:before], *vae, *others[before:]]


def build_decode_request(kept: SavedLatents, given: Mapping[str, Any]) -> tuple[dict[str, str], ImageRequest]:
    """The request that made the latents, with what is `given` instead; before it, where each setting came from.

    Raises DataError for latents that tell no request, UsageError for what is given wrongly.
    """
    kind = UpscaleRequest if kept.made_with.get("image") else GenerateRequest
    try:
        merged = settings.merge(
            [settings.flag_layer(given), settings.Layer(f"latents {kept.path}", settings_from_metadata(kept, kind))]
        )
        return merged.origins(kind), settings.build_request(merged, kind)
    except (LookupError, ValueError, TypeError, AttributeError, UsageError) as error:
        if given.get(getattr(error, "setting", None) or "") is not None:
            raise
        raise DataError(f"{kept.path} tells no request of ours ({error}).", "Make it again.") from error


def settings_from_metadata(kept: SavedLatents, kind: type[ImageRequest]) -> dict[str, Any]:
    """The settings that the latents were made with; those of other files than the picture are not theirs any more."""
    made, parsers = kept.made_with, settings.PARSERS
    values = {name: parsers[name](made[name]) for name in parsers if made.get(name) is not None}
    values |= {"image": Path(made["image"])} if kind is UpscaleRequest else {}
    return values | {"save_phases": False, "format": None, "output": kept.path.with_suffix(".tif")}
