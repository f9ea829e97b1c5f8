"""From a request to a file: the whole story of making a picture, from noise or from a picture that there is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace

from linfusion_cli import images
from linfusion_cli.device import describe, versions
from linfusion_cli.events import Observer
from linfusion_cli.images.source import SourcePicture
from linfusion_cli.jobs.complete import files_of, left_files
from linfusion_cli.jobs.keep import journal_head, journal_of, opened_keeper
from linfusion_cli.jobs.latents import write_latents
from linfusion_cli.jobs.outputs import held_outputs, made_with, opened_outputs, opened_phases
from linfusion_cli.jobs.prepare import check_disk, prepare
from linfusion_cli.jobs.record import Recorder
from linfusion_cli.jobs.weights import hashed_weights, to_json
from linfusion_cli.report import RunReport
from linfusion_cli.request import PictureRequest

COMPLETE = "{} was complete already, by an earlier run of the same request."


def make_picture(
    request: PictureRequest, picture: SourcePicture | None, origins: Mapping[str, str], observer: Observer
) -> RunReport:
    """Make the picture and write it to `request.output`; `origins` says of each setting where its value came from.

    Goes on from what an earlier run of the same request has saved. Returns with the file complete under its final
    name, or raises a LinfusionError or Stopped, with what was reached saved beside it.
    """
    started = time.perf_counter()
    recorder = Recorder(observer)
    ours = left_files(request)
    if ours == files_of(request) and not request.overwrite:
        recorder.notice(COMPLETE.format(request.output))
        with journal_of(request).held() as journal:
            journal.remove()
        report = RunReport(request.to_json(), dict(origins), {}, versions(), already_complete=True)
        return finished(report, request, started)
    # 1. hold files and journal, so that nobody else does: refused before any work; 2. see what an earlier run has left
    with (
        held_outputs(request, ours) as held,
        opened_keeper(request, recorder.notice) as keeper,
    ):
        with recorder.stage("start", "load", None, 1, "start"):
            prepared = prepare(request, picture)  # 3. find the model, settle the phases, check disk and memory
            check_disk(prepared)
            from linfusion_cli.jobs import paint, pixels  # torch and diffusers take seconds to import

            run = paint.begin(prepared, recorder, keeper)
        machine, plan = describe(run.device), run.plan.to_json()
        weights = hashed_weights(prepared, recorder)
        keeper.begin(journal_head(request, weights, run.plan))
        report = RunReport(
            request.to_json(), dict(origins), machine, versions(), plan, to_json(weights), recorder.stages
        )
        report.resumed_from = keeper.was_found
        with opened_outputs(request, held, weights) as sink, opened_phases(prepared, weights, keeper) as phase_sinks:
            run = replace(run, phase_sinks=phase_sinks)
            with keeper.stoppable():
                vae = paint.load_decoder(run)
                latents = paint.painted(run, vae)  # 4. the base, and up the ladder
                if held.latents is not None:
                    write_latents(held.latents, latents, prepared.phases[-1].size, made_with(request, weights))
                pixels.write(run, vae, latents, sink)  # 5. stream into the files, which get their names
        keeper.complete()
    report.checkpoints = asdict(keeper.saves)
    return finished(report, request, started)


def finished(report: RunReport, request: PictureRequest, started: float) -> RunReport:
    """The report of a run that has just completed its file, which began at `started`."""
    report.output, report.size = str(request.output), request.size
    report.format = images.format_for(request.output, request.format)
    with suppress(OSError):  # whoever waited for the file may have moved it already
        report.file_bytes = request.output.stat().st_size
    report.total_seconds = time.perf_counter() - started
    return report
