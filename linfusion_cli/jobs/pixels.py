"""Between latents and pictures: decoding, resizing, encoding and writing, strip by strip."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from linfusion_cli.geometry import Size, bands
from linfusion_cli.images import RowSink
from linfusion_cli.images.quantise import quantised
from linfusion_cli.images.resize import ReadRegion, resized_region
from linfusion_cli.images.scratch import ScratchPicture
from linfusion_cli.jobs.run import Run
from linfusion_cli.jobs.writing import Writing
from linfusion_cli.models.load import Vae
from linfusion_cli.sampling.noise import latent_noise
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import DrawNoise, encode_rows

BAND_PX = 256  # rows resized at a time when a base is reduced to a smaller target


def enlarge(run: Run, vae: Vae, latents: Tensor, phase: int) -> Tensor:
    """Latents of the phase before `phase` -> latents of the same picture at the size of `phase`."""
    size = run.prepared.sizes[phase - 1]
    in_memory = run.plan.stage("encode", phase).waiting_bytes > 0
    with ScratchPicture(None if in_memory else run.prepared.folder, size.width, size.height) as scratch:
        for rows in _decoded(run, vae, latents, phase - 1):
            scratch.append(rows)
        return _encoded(run, vae, scratch, phase)


def _decoded(run: Run, vae: Vae, latents: Tensor, phase: int) -> Iterator[np.ndarray]:
    """The rows [rows, W, 3] of the picture that the `latents` of `phase` are, as float32 between 0 and 1."""
    done, method = 0, run.plan.stage("decode", phase).mode
    with run.stage("decode", phase) as stage:
        for rows in decode_rows(vae, latents, method, run.recorder.notice):
            done += len(rows)
            stage.advance(done)
            with stage.paused():
                yield rows.numpy()


def _encoded(run: Run, vae: Vae, scratch: ScratchPicture, phase: int) -> Tensor:
    """The picture in `scratch`, resized to the size of `phase`, as latents [1, C, h, w]."""
    target, facts, done = run.prepared.sizes[phase], run.prepared.facts, 0
    size_lat, method = target.divided(facts.vae_factor), run.plan.stage("encode", phase).mode
    latents = torch.empty(1, facts.latent_channels, size_lat.height, size_lat.width)
    resized = _resized_reader(scratch, target)

    def read(*region: int) -> Tensor:
        return torch.from_numpy(resized(*region))

    with run.stage("encode", phase) as stage:
        for rows in encode_rows(vae, read, target, method, _draw(run, phase, size_lat), run.recorder.notice):
            latents[:, :, done : done + rows.shape[2]] = rows
            done += rows.shape[2]
            stage.advance(done * facts.vae_factor)
    return latents


def _draw(run: Run, phase: int, size_lat: Size) -> DrawNoise | None:
    """The noise of a draw from the VAE's distribution, where one is wanted and not the mean."""
    request, channels = run.prepared.request, run.prepared.facts.latent_channels
    if request.vae_latents == "mean":
        return None
    noise = latent_noise(request.seed, phase, channels, size_lat.height, size_lat.width)
    return lambda top, bottom: noise[:, :, top:bottom]


def _resized_reader(scratch: ScratchPicture, target: Size) -> ReadRegion:
    """Reads the picture in `scratch` as if it were `target` px."""
    source = (scratch.width, scratch.height)
    return lambda *region: resized_region(scratch.read, source, target.pair, region)


def write(run: Run, vae: Vae, latents: Tensor, sink: RowSink) -> None:
    """Decode `latents`, hand `sink` the rows at exactly the size asked for, and complete it.

    The last rows are written while the next are decoded.
    """
    request = run.prepared.request
    numbers = partial(quantised, bits=request.bits, seed=request.seed if request.dither else None)
    top = 0
    with Writing(sink) as writing:
        for rows in finished_rows(run, vae, latents):
            writing.take(numbers(rows, top=top))
            top += len(rows)
        writing.finish()
    with run.recorder.stage("write", "write", request.size, 1, "file", spent_sec=writing.seconds):
        sink.close()


def finished_rows(run: Run, vae: Vae, latents: Tensor) -> Iterator[np.ndarray]:
    """The rows of the finished picture: cropped to the size asked for, or reduced to it if that is below the base."""
    size, wanted = run.prepared.sizes[-1], run.prepared.request.size
    decoded = _decoded(run, vae, latents, len(run.prepared.sizes) - 1)
    if run.prepared.is_reduced:
        yield from _reduced(run, decoded, size, wanted)
    else:
        yield from cropped(decoded, wanted)


def cropped(rows: Iterator[np.ndarray], size: Size) -> Iterator[np.ndarray]:
    """The upper left `size` px of a picture given by `rows`, all of which are taken."""
    left = size.height
    for part in rows:
        kept = part[:left, : size.width]
        left -= len(kept)
        if len(kept):
            yield kept


def _reduced(run: Run, rows: Iterator[np.ndarray], size: Size, wanted: Size) -> Iterator[np.ndarray]:
    with ScratchPicture(run.prepared.folder, size.width, size.height) as scratch:
        for part in rows:
            scratch.append(part)
        read = _resized_reader(scratch, wanted)
        for top, bottom in bands(wanted.height, BAND_PX):
            yield read(top, bottom, 0, wanted.width)
