"""From a request to a file: the whole story of making a picture, from noise or from a picture that there is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from linfusion_cli.device import describe, versions
from linfusion_cli.events import Observer
from linfusion_cli.images.source import SourcePicture
from linfusion_cli.jobs.complete import already_made
from linfusion_cli.jobs.outputs import held_outputs, opened_outputs, opened_phases
from linfusion_cli.jobs.prepare import check_disk, prepare
from linfusion_cli.jobs.record import Recorder
from linfusion_cli.jobs.shelf import Shelf
from linfusion_cli.jobs.weights import hashed_weights, to_json
from linfusion_cli.report import RunReport
from linfusion_cli.request import PictureRequest


def make_picture(
    request: PictureRequest,
    picture: SourcePicture | None,
    origins: Mapping[str, str],
    observer: Observer,
    shelf: Shelf | None = None,
    keep_complete: bool = False,
) -> RunReport:
    """Make the picture and write it to `request.output`; `origins` says of each setting where its value came from.

    What lies on `shelf` is used, and what the run loads stays there. With `keep_complete`, a file that is there
    already, whole and of this very request, is left as it is. Raises a LinfusionError, with nothing left behind but the
    phases that were to be kept, or returns with the file complete under its final name.
    """
    started = time.perf_counter()
    recorder, shelf = Recorder(observer), shelf or Shelf(keeps=False)
    if keep_complete and (found := already_made(request, picture, origins, recorder, shelf)):
        return found
    with held_outputs(request) as held:  # 1. hold the files, so that nobody else does: refused before any work
        with recorder.stage("start", "load", None, 1, "start"):
            prepared = prepare(request, picture)  # 2. find the model, settle the phases, check disk and memory
            check_disk(prepared)
            from linfusion_cli.jobs import paint, pixels  # torch and diffusers take seconds to import

            run = paint.begin(prepared, recorder, shelf)
        machine, plan = describe(run.device), run.plan.to_json()
        weights = hashed_weights(prepared, recorder, shelf)
        report = RunReport(
            request.to_json(), dict(origins), machine, versions(), plan, to_json(weights), recorder.stages
        )
        with opened_outputs(request, held, weights) as sink, opened_phases(prepared, weights) as phase_sinks:
            run = replace(run, phase_sinks=phase_sinks)
            conditioning = paint.read_prompts(run)  # 3. text encoders come and go before the UNet
            models = paint.load(run, conditioning)
            run = paint.settled(run, models)
            latents, channels = paint.first(run, models)  # 4. the base, from noise or from the picture
            for phase in prepared.phases[1:]:  # 5. up the ladder
                enlarged = pixels.enlarge(run, models.vae, latents, phase)
                latents = paint.grow(run, models, enlarged, channels, phase)
            pixels.write(run, models.vae, latents, sink)  # 6. stream into the files, which get their names
    report.output, report.size, report.format = str(request.output), request.size, prepared.format
    with suppress(OSError):  # whoever waited for the file may have moved it already
        report.file_bytes = request.output.stat().st_size
    report.total_seconds = time.perf_counter() - started
    return report
