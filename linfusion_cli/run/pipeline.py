"""The pipeline of `generate` and `upscale`: resolve the request, plan, load models, denoise, decode, write."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from linfusion_cli.core.events import Observer, ignore_event
from linfusion_cli.core.report import RunReport
from linfusion_cli.core.signals import reraise_stop
from linfusion_cli.images.read.source import SourceImage
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.run.checkpoint.compatibility import build_metadata
from linfusion_cli.run.checkpoint.latents_file import write_latents
from linfusion_cli.run.checkpoint.manager import CheckpointManager, open_manager
from linfusion_cli.run.inputs.disk import check_disk_space
from linfusion_cli.run.inputs.provenance import hash_weights
from linfusion_cli.run.inputs.resolve import resolve_request
from linfusion_cli.run.inputs.source_image import resolve_source_image
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
from linfusion_cli.run.progress.time_limit import explain_time_limit
from linfusion_cli.settings.request import Request

if TYPE_CHECKING:
    from linfusion_cli.run.stages.context import RunContext


def generate(request: Request, origins: Mapping[str, str], observer: Observer = ignore_event) -> RunReport:
    """Generate an image from a prompt, or upscale the source image of the request.

    Raise a LinfusionError on failure; no partial output file remains.
    """
    request, image = resolve_source_image(request)
    return run_pipeline(request, image, origins, observer)


@reraise_stop()
def run_pipeline(
    request: Request,
    image: SourceImage | None,
    origins: Mapping[str, str],
    observer: Observer,
    model_cache: ModelCache | None = None,
    keep_complete: bool = False,
) -> RunReport:
    """Generate the image and write it to `request.execution.output`.

    `origins` maps each setting to the source of its value. The run resumes from the checkpoint of an earlier run of the
    same request. Models are taken from `model_cache` and stored there. With `keep_complete`, a complete output file of
    the same request is kept.

    On return the file is complete and has its final name. Raise a LinfusionError or Stopped otherwise; the state of the
    run is then saved in a checkpoint next to the output.
    """
    recorder, model_cache = RunRecorder(observer), model_cache or ModelCache(enabled=False)
    with explain_time_limit(recorder):
        return complete_image(request, image, origins, recorder, model_cache, keep_complete)


def complete_image(
    request: Request,
    image: SourceImage | None,
    origins: Mapping[str, str],
    recorder: RunRecorder,
    model_cache: ModelCache,
    keep_complete: bool,
) -> RunReport:
    """Do the work of `run_pipeline`: the stages of a run in their order."""
    started = time.perf_counter()
    existing = find_existing(request, image, recorder, model_cache, keep_complete)
    if existing.report is not None:
        remove_checkpoint(request, recorder.notify)
        return complete_report(replace(existing.report, settings=dict(origins)), request, started)
    # 1. Reserve the output and lock the checkpoint before any work; find the state of an earlier run.
    with (
        reserve_output(request, existing.files) as file,
        open_manager(request, recorder.notify) as checkpoints,
        checkpoints.save_on_interrupt(),
    ):
        run = start_run(request, image, recorder, checkpoints, model_cache)  # 2. Find the files and plan the phases.
        resolved = run.resolved
        weights = hash_weights(resolved, recorder, model_cache)
        checkpoints.start(build_metadata(resolved, weights, run.plan))
        report = run.build_report(request, origins, weights)
        report.resumed_from = checkpoints.resumed_from
        report.dtypes = checkpoints.dtypes
        provenance = Provenance(request, weights, checkpoints.previous is not None, checkpoints.dtypes)
        with (
            open_outputs(file, provenance) as sink,
            open_phase_files(resolved, provenance, checkpoints.initial_state().phase_state.phase) as phase_sinks,
            reserve_latents(provenance) as latents_file,
        ):
            run = replace(
                run,
                phase_sinks=phase_sinks,
                update_metadata=partial(update_metadata, resolved, provenance, sink, phase_sinks),
            )
            from linfusion_cli.run.stages import denoise, load, write  # not at the top: importing torch takes seconds

            vae = load.prepare_vae(run)
            run, latents = denoise.denoise_all(run, vae)  # 3. Run all phases.
            report.plan = run.plan.to_json()  # replaced after NaN in half precision
            if latents_file is not None:
                write_latents(latents_file, latents, resolved.phases[-1].size, provenance.as_metadata())
            write.write_output(run, vae, latents, sink)  # 4. Decode into the files and rename them.
        checkpoints.finish()
    report.checkpoints = asdict(checkpoints.statistics)
    return complete_report(report, request, started)


def start_run(
    request: Request,
    image: SourceImage | None,
    recorder: RunRecorder,
    checkpoints: CheckpointManager,
    model_cache: ModelCache,
) -> RunContext:
    """Resolve and plan the request, as recorded stages. Raise a LinfusionError if it cannot run."""
    with recorder.stage("resolve", None, 1, "request"):
        resolved = resolve_request(request, image)
        check_disk_space(resolved)
        for warning in resolved.facts.warnings:
            recorder.notify(warning)
    with recorder.stage("plan", None, 1, "plan"):
        from linfusion_cli.run.stages import load  # importing torch and diffusers takes seconds

        return load.start_run(resolved, recorder, checkpoints, model_cache)
