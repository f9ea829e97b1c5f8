"""Decode the final latents and write the output image, strip by strip."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from linfusion_cli.core.geometry import Size, split_rows
from linfusion_cli.images import RowSink
from linfusion_cli.images.process.scratch import ScratchImage
from linfusion_cli.models.load.networks import Vae
from linfusion_cli.run.outputs.async_writer import AsyncWriter
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.run.stages.convert import build_resized_reader, decode_phase, quantise_rows

BAND_ROWS = 256  # rows of the target resized at a time when the base is downscaled


def write_output(run: RunContext, vae: Vae, latents: Tensor, sink: RowSink) -> None:
    """Decode `latents`, write the image to `sink` at the requested size, and close it.

    Each strip is written while the next one is decoded.
    """
    request, top = run.resolved.request, 0
    with AsyncWriter(sink) as writer:
        for rows in decode_output(run, vae, latents):
            writer.write(quantise_rows(request, rows, top))
            top += len(rows)
        writer.finish()
    with run.recorder.stage("write", request.size, 1, "file", spent_sec=writer.seconds):
        sink.close()


def decode_output(run: RunContext, vae: Vae, latents: Tensor) -> Iterator[np.ndarray]:
    """Yield the rows of the final image, cropped to the requested size, or downscaled to it if the base is larger."""
    phase, size = run.resolved.phases[-1], run.resolved.request.size
    rows = decode_phase(run, vae, latents, phase)
    yield from _downscale_rows(run, rows, phase.size, size) if run.resolved.is_downscaled else crop_rows(rows, size)


def crop_rows(rows: Iterator[np.ndarray], size: Size) -> Iterator[np.ndarray]:
    """Yield the upper left `size` px of the image. All `rows` are consumed, also those below."""
    missing = size.height
    for strip in rows:
        cropped = strip[:missing, : size.width]
        missing -= len(cropped)
        if len(cropped):
            yield cropped


def _downscale_rows(run: RunContext, rows: Iterator[np.ndarray], size: Size, target: Size) -> Iterator[np.ndarray]:
    with ScratchImage(run.resolved.output_folder, size.width, size.height) as scratch:
        for strip in rows:
            scratch.append(strip)
        read = build_resized_reader(scratch.read, size, target)
        for top, bottom in split_rows(target.height, BAND_ROWS):
            yield read(top, bottom, 0, target.width)
