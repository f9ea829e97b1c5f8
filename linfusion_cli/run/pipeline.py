"""The generation pipeline: resolve, plan, load, denoise, decode, write. Shared by `generate` and `upscale`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial

from linfusion_cli.core.events import Observer, nobody
from linfusion_cli.core.report import RunReport
from linfusion_cli.core.signals import honoured
from linfusion_cli.hardware.device import describe, versions
from linfusion_cli.images.read.source import SourcePicture
from linfusion_cli.models.cache import Shelf
from linfusion_cli.run.checkpoint.latents_file import write_latents
from linfusion_cli.run.checkpoint.manager import journal_head, opened_keeper
from linfusion_cli.run.inputs.provenance import hashed_weights, to_json
from linfusion_cli.run.inputs.resolve import check_disk, prepare
from linfusion_cli.run.inputs.source_image import opened
from linfusion_cli.run.outputs.existing import Making, clear_journal, made_before
from linfusion_cli.run.outputs.open import held_latents, held_picture, opened_outputs, opened_phases, retell
from linfusion_cli.run.outputs.report import finished
from linfusion_cli.run.progress.recorder import Recorder
from linfusion_cli.settings.request import GenerateRequest, PictureRequest, UpscaleRequest


def generate(request: GenerateRequest, origins: Mapping[str, str], observer: Observer = nobody) -> RunReport:
    """Generate the image of a prompt; raises a LinfusionError, with no partial file left."""
    return make_picture(request, None, origins, observer)


def upscale(request: UpscaleRequest, origins: Mapping[str, str], observer: Observer = nobody) -> RunReport:
    """Upscale the image `request.image`; raises a LinfusionError, with no partial file left."""
    request, picture = opened(request)
    return make_picture(request, picture, origins, observer)


@honoured()
def make_picture(
    request: PictureRequest,
    picture: SourcePicture | None,
    origins: Mapping[str, str],
    observer: Observer,
    shelf: Shelf | None = None,
    keep_complete: bool = False,
) -> RunReport:
    """Make the picture and write it to `request.output`; `origins` says of each setting where its value came from.

    Goes on from what an earlier run of the same request has saved. What lies on `shelf` is used, and what the run loads
    stays there. With `keep_complete`, a file that is there already, whole and of this very request, is left as it is.
    Returns with the file complete under its final name, or raises a LinfusionError or Stopped, with what was reached
    saved beside it.
    """
    started = time.perf_counter()
    recorder, shelf = Recorder(observer), shelf or Shelf(keeps=False)
    made = made_before(request, picture, recorder, shelf, keep_complete)
    if made.report is not None:
        clear_journal(request)
        return finished(replace(made.report, settings=dict(origins)), request, started)
    # 1. hold file and journal, so that nobody else does: refused before any work; see what an earlier run has left
    with (
        held_picture(request, made.files) as file,
        opened_keeper(request, recorder.notice) as keeper,
        keeper.stoppable(),
    ):
        with recorder.stage("start", "load", None, 1, "start"):
            prepared = prepare(request, picture)  # 2. find the model, settle the phases, check disk and memory
            check_disk(prepared)
            for warning in prepared.facts.warnings:
                recorder.notice(warning)
            from linfusion_cli.run.stages import convert, denoise, load  # torch and diffusers take seconds to import

            run = load.begin(prepared, recorder, keeper, shelf)
        machine, plan = describe(run.device), run.plan.to_json()
        weights = hashed_weights(prepared, recorder, shelf)
        keeper.begin(journal_head(prepared, weights, run.plan))
        report = RunReport(
            request.to_json(), dict(origins), machine, versions(), plan, to_json(weights), recorder.stages
        )
        report.resumed_from = keeper.was_found
        report.dtypes = keeper.dtypes
        making = Making(request, weights, keeper.found is not None, keeper.dtypes)
        with (
            opened_outputs(file, making) as sink,
            opened_phases(prepared, making, keeper.found_state().begun.phase) as phase_sinks,
            held_latents(making) as kept,
        ):
            run = replace(run, phase_sinks=phase_sinks, retell=partial(retell, prepared, making, sink, phase_sinks))
            vae = load.load_decoder(run)
            run, latents = denoise.painted(run, vae)  # 3. the base, and up the ladder
            report.plan = run.plan.to_json()  # another one after NaN in half precision
            if kept is not None:
                write_latents(kept, latents, prepared.phases[-1].size, making.told)
            convert.write(run, vae, latents, sink)  # 4. stream into the files, which get their names
        keeper.complete()
    report.checkpoints = asdict(keeper.saves)
    return finished(report, request, started)
