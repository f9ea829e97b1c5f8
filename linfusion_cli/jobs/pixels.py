"""Between latents and pictures: decoding, resizing, encoding and writing, strip by strip."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from linfusion_cli.geometry import Size, bands
from linfusion_cli.images import RowSink
from linfusion_cli.images.resize import resized_rows
from linfusion_cli.images.scratch import ScratchPicture
from linfusion_cli.jobs.run import Run, checked
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import encode_rows

BAND_PX = 256  # rows resized at a time when a base is reduced to a smaller target


def enlarge(run: Run, vae: AutoencoderKL, latents: Tensor, phase: int) -> Tensor:
    """Latents of the phase before `phase` -> latents of the same picture at the size of `phase`."""
    size = run.prepared.sizes[phase - 1]
    with ScratchPicture(run.prepared.folder, size.width, size.height) as scratch:
        for rows in _decoded(run, vae, latents, phase - 1):
            scratch.append(rows)
        return _encoded(run, vae, scratch, phase)


def _decoded(run: Run, vae: AutoencoderKL, latents: Tensor, phase: int) -> Iterator[np.ndarray]:
    """The rows [rows, W, 3] of the picture that the `latents` of `phase` are, as float32 between 0 and 1."""
    done = 0
    with run.stage("decode", phase) as stage:
        for rows in decode_rows(vae, latents, run.window_lat):
            done += len(rows)
            stage.advance(done)
            with stage.paused():
                yield checked(rows, "The VAE gave NaN.").numpy()


def _encoded(run: Run, vae: AutoencoderKL, scratch: ScratchPicture, phase: int) -> Tensor:
    """The picture in `scratch`, resized to the size of `phase`, as latents [1, C, h, w]."""
    target = run.prepared.sizes[phase]
    read = _resized_reader(scratch, target)
    done, strips = 0, []
    with run.stage("encode", phase) as stage:
        for strip in encode_rows(vae, lambda top, bottom: torch.from_numpy(read(top, bottom)), target, run.window_lat):
            strips.append(strip)
            done += strip.shape[2] * run.prepared.facts.vae_factor
            stage.advance(done)
    return checked(torch.cat(strips, dim=2), "The VAE gave NaN.")


def _resized_reader(scratch: ScratchPicture, target: Size) -> Callable[[int, int], np.ndarray]:
    """Reads rows of the picture in `scratch` as if it were `target` px."""
    source = (scratch.width, scratch.height)
    return lambda top, bottom: resized_rows(scratch.read, source, (target.width, target.height), top, bottom)


def write(run: Run, vae: AutoencoderKL, latents: Tensor, sink: RowSink) -> None:
    """Decode `latents`, hand `sink` the rows in 8 bits, at exactly the size asked for, and complete it."""
    seconds = 0.0
    for rows in finished_rows(run, vae, latents):
        began = time.perf_counter()
        sink.write(np.rint(rows * 255).astype(np.uint8))
        seconds += time.perf_counter() - began
    with run.recorder.stage("write", "write", run.prepared.request.size, 1, "file", spent_sec=seconds):
        sink.close()


def finished_rows(run: Run, vae: AutoencoderKL, latents: Tensor) -> Iterator[np.ndarray]:
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
            yield read(top, bottom)
