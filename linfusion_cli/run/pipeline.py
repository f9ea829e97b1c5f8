"""The generation pipeline: resolve, plan, load, denoise, decode, write. Shared by `generate` and `upscale`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial

from linfusion_cli.core.events import Observer, ignore_event
from linfusion_cli.core.report import RunReport
from linfusion_cli.core.signals import reraise_stop
from linfusion_cli.hardware.device import describe, versions
from linfusion_cli.images.read.source import SourceImage
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.run.checkpoint.latents_file import write_latents
from linfusion_cli.run.checkpoint.manager import build_metadata, open_manager
from linfusion_cli.run.inputs.provenance import hash_weights, to_json
from linfusion_cli.run.inputs.resolve import check_disk, resolve_request
from linfusion_cli.run.inputs.source_image import open_source
from linfusion_cli.run.outputs.existing import Provenance, find_existing, remove_checkpoint
from linfusion_cli.run.outputs.open import (
    open_outputs,
    open_phase_files,
    reserve_latents,
    reserve_output,
    update_metadata,
)
from linfusion_cli.run.outputs.report import complete_report
from linfusion_cli.run.progress.recorder import RunRecorder
from linfusion_cli.settings.request import GenerateRequest, ImageRequest, UpscaleRequest


def generate(request: GenerateRequest, origins: Mapping[str, str], observer: Observer = ignore_event) -> RunReport:
    """Generate the image of a prompt; raises a LinfusionError, with no partial file left."""
    return run_pipeline(request, None, origins, observer)


def upscale(request: UpscaleRequest, origins: Mapping[str, str], observer: Observer = ignore_event) -> RunReport:
    """Upscale the image `request.image`; raises a LinfusionError, with no partial file left."""
    request, image = open_source(request)
    return run_pipeline(request, image, origins, observer)


@reraise_stop()
def run_pipeline(
    request: ImageRequest,
    image: SourceImage | None,
    origins: Mapping[str, str],
    observer: Observer,
    model_cache: ModelCache | None = None,
    keep_complete: bool = False,
) -> RunReport:
    """Make the picture and write it to `request.output`; `origins` says of each setting where its value came from.

    Goes on from what an earlier run of the same request has saved. What lies on `shelf` is used, and what the run loads
    stays there. With `keep_complete`, a file that is there already, whole and of this very request, is left as it is.
    Returns with the file complete under its final name, or raises a LinfusionError or Stopped, with what was reached
    saved beside it.
    """
    started = time.perf_counter()
    recorder, model_cache = RunRecorder(observer), model_cache or ModelCache(keeps=False)
    made = find_existing(request, image, recorder, model_cache, keep_complete)
    if made.report is not None:
        remove_checkpoint(request)
        return complete_report(replace(made.report, settings=dict(origins)), request, started)
    # 1. hold file and journal, so that nobody else does: refused before any work; see what an earlier run has left
    with (
        reserve_output(request, made.files) as file,
        open_manager(request, recorder.notice) as checkpoints,
        checkpoints.save_on_interrupt(),
    ):
        with recorder.stage("start", "load", None, 1, "start"):
            resolved = resolve_request(request, image)  # 2. find the model, settle the phases, check disk and memory
            check_disk(resolved)
            for warning in resolved.facts.warnings:
                recorder.notice(warning)
            from linfusion_cli.run.stages import convert, denoise, load  # torch and diffusers take seconds to import

            run = load.start_run(resolved, recorder, checkpoints, model_cache)
        machine, plan = describe(run.device), run.plan.to_json()
        weights = hash_weights(resolved, recorder, model_cache)
        checkpoints.begin(build_metadata(resolved, weights, run.plan))
        report = RunReport(
            request.to_json(), dict(origins), machine, versions(), plan, to_json(weights), recorder.stages
        )
        report.resumed_from = checkpoints.resumed_from
        report.dtypes = checkpoints.dtypes
        making = Provenance(request, weights, checkpoints.found is not None, checkpoints.dtypes)
        with (
            open_outputs(file, making) as sink,
            open_phase_files(resolved, making, checkpoints.initial_state().begun.phase) as phase_sinks,
            reserve_latents(making) as kept,
        ):
            run = replace(
                run, phase_sinks=phase_sinks, retell=partial(update_metadata, resolved, making, sink, phase_sinks)
            )
            vae = load.load_decoder(run)
            run, latents = denoise.denoise_all(run, vae)  # 3. the base, and up the ladder
            report.plan = run.plan.to_json()  # another one after NaN in half precision
            if kept is not None:
                write_latents(kept, latents, resolved.phases[-1].size, making.told)
            convert.write_output(run, vae, latents, sink)  # 4. stream into the files, which get their names
        checkpoints.complete()
    report.checkpoints = asdict(checkpoints.saves)
    return complete_report(report, request, started)
