"""Between latents and pictures: decoding, resizing, encoding and writing, strip by strip."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion_cli.core.geometry import Size, split_rows
from linfusion_cli.images import RowSink
from linfusion_cli.images.process.quantise import quantise
from linfusion_cli.images.process.resize import ReadRegion, resize_region
from linfusion_cli.images.process.scratch import ScratchImage
from linfusion_cli.images.read.source import SourceImage, apply_orientation, source_rows
from linfusion_cli.models.load.parts import Vae
from linfusion_cli.run.outputs.async_writer import AsyncWriter
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.sampling.noise import latent_noise
from linfusion_cli.sampling.phases import Phase
from linfusion_cli.settings.request import ImageRequest
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import DrawNoise, encode_rows

BAND_PX = 256  # rows resized at a time when a base is reduced to a smaller target


def upscale_latents(run: RunContext, vae: Vae, latents: Tensor, phase: Phase) -> Tensor:
    """Latents of the phase before `phase` -> latents of the same picture at the size of `phase`."""
    before = run.resolved.phases[phase.index - 1]
    if run.resolved.request.upscale_space == "latent":
        if run.plan.has("decode", before.index):
            deque(decode_phase(run, vae, latents, before), maxlen=0)  # only to be kept
        return interpolate_latents(latents, phase.size.divide(run.resolved.facts.vae_factor))
    with scratch_image(run, before.size, phase) as scratch:
        for rows in decode_phase(run, vae, latents, before):
            scratch.append(rows)
        return encode_image(run, vae, scratch.read, before.size, phase)


def interpolate_latents(latents: Tensor, size_lat: Size) -> Tensor:
    """`latents` [1, C, h, w] interpolated to `size_lat`, as DemoFusion's published code does."""
    return F.interpolate(latents, (size_lat.height, size_lat.width), mode="bicubic")


def encode_source(run: RunContext, vae: Vae, image: SourceImage) -> Tensor:
    """The user's picture as latents of the first phase."""
    first, behind = run.resolved.phases[0], run.resolved.request.behind()
    stored, seen = image.stored_size, image.size
    with scratch_image(run, stored, first) as scratch:
        with run.recorder.stage("read", "read", seen, stored.height, "rows") as stage:
            done = 0
            for rows in source_rows(image, behind, run.recorder.notice):
                scratch.append(rows)
                done += len(rows)
                stage.advance(done)
        return encode_image(run, vae, apply_orientation(scratch.read, image), seen, first)


def scratch_image(run: RunContext, size: Size, phase: Phase) -> ScratchImage:
    """Where a picture of this size waits until `phase` encodes it: in memory if the plan has room for it."""
    in_memory = run.plan.stage("encode", phase.index).waiting_bytes > 0
    return ScratchImage(None if in_memory else run.resolved.folder, size.width, size.height)


def decode_phase(run: RunContext, vae: Vae, latents: Tensor, phase: Phase) -> Iterator[np.ndarray]:
    """The rows [rows, W, 3] of the picture that the `latents` of `phase` are, as float32 between 0 and 1.

    They go to the phase's own file too, if it has one.
    """
    done, planned, sink = 0, run.plan.stage("decode", phase.index), run.phase_sinks.get(phase.index)
    with run.stage("decode", phase.index) as stage:
        for rows in decode_rows(vae, latents, planned.mode, run.recorder.notice, planned.need.pinned_bytes):
            rows = rows.numpy()
            if sink is not None:
                sink.write(to_uint(run.resolved.request, rows, done))
            done += len(rows)
            stage.advance(done)
            with stage.paused():
                yield rows
        if sink is not None:
            sink.close()


def to_uint(request: ImageRequest, rows: np.ndarray, top: int) -> np.ndarray:
    """Float rows, from row `top` of a picture on, as its file takes them."""
    return quantise(rows, top, request.bits, request.seed if request.dither else None)


def encode_image(run: RunContext, vae: Vae, read: ReadRegion, size: Size, phase: Phase) -> Tensor:
    """The picture of `size` that `read` reads, enlarged to the size of `phase`, as latents [1, C, h, w]."""
    facts, done = run.resolved.facts, 0
    size_lat, planned = phase.size.divide(facts.vae_factor), run.plan.stage("encode", phase.index)
    pinned = planned.need.pinned_bytes
    latents = torch.empty(1, facts.latent_channels, size_lat.height, size_lat.width)
    resized = resized_reader(read, size, run.resolved.visible_size(phase))

    def read_tensor(*region: int) -> Tensor:
        return torch.from_numpy(resized(*region))

    with run.stage("encode", phase.index) as stage:
        draw = _draw(run, phase.index, size_lat)
        for rows in encode_rows(vae, read_tensor, phase.size, planned.mode, draw, run.recorder.notice, pinned):
            latents[:, :, done : done + rows.shape[2]] = rows
            done += rows.shape[2]
            stage.advance(done * facts.vae_factor)
    return latents


def _draw(run: RunContext, phase: int, size_lat: Size) -> DrawNoise | None:
    """The noise of a draw from the VAE's distribution, where one is wanted and not the mean."""
    request, channels = run.resolved.request, run.resolved.facts.latent_channels
    if request.vae_latents == "mean":
        return None
    noise = latent_noise(request.seed, phase, channels, size_lat.height, size_lat.width)
    return lambda top, bottom: noise[:, :, top:bottom]


def resized_reader(read: ReadRegion, source: Size, target: Size) -> ReadRegion:
    """Reads a picture of the size `source` as if it were `target` px; beyond that, its last row and column go on.

    So a picture fills exactly what will be left of a phase, whose sides are multiples, when it is cropped.
    """

    def read_resized(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        height, width = target.height, target.width
        inside = (min(top, height - 1), min(bottom, height), min(left, width - 1), min(right, width))
        rows = resize_region(read, source.pair, target.pair, inside)
        missing = ((0, bottom - top - rows.shape[0]), (0, right - left - rows.shape[1]), (0, 0))
        return np.pad(rows, missing, mode="edge") if missing[0][1] or missing[1][1] else rows

    return read_resized


def write_output(run: RunContext, vae: Vae, latents: Tensor, sink: RowSink) -> None:
    """Decode `latents`, hand `sink` the rows at exactly the size asked for, and complete it.

    The last rows are written while the next are decoded.
    """
    request, top = run.resolved.request, 0
    with AsyncWriter(sink) as writing:
        for rows in output_rows(run, vae, latents):
            writing.take(to_uint(request, rows, top))
            top += len(rows)
        writing.finish()
    with run.recorder.stage("write", "write", request.size, 1, "file", spent_sec=writing.seconds):
        sink.close()


def output_rows(run: RunContext, vae: Vae, latents: Tensor) -> Iterator[np.ndarray]:
    """The rows of the finished picture: cropped to the size asked for, or reduced to it if that is below the base."""
    phase, wanted = run.resolved.phases[-1], run.resolved.request.size
    rows = decode_phase(run, vae, latents, phase)
    yield from _downscale_rows(run, rows, phase.size, wanted) if run.resolved.is_downscaled else crop_rows(rows, wanted)


def crop_rows(rows: Iterator[np.ndarray], size: Size) -> Iterator[np.ndarray]:
    """The upper left `size` px of a picture given by `rows`, all of which are taken."""
    left = size.height
    for part in rows:
        kept = part[:left, : size.width]
        left -= len(kept)
        if len(kept):
            yield kept


def _downscale_rows(run: RunContext, rows: Iterator[np.ndarray], size: Size, wanted: Size) -> Iterator[np.ndarray]:
    with ScratchImage(run.resolved.folder, size.width, size.height) as scratch:
        for part in rows:
            scratch.append(part)
        read = resized_reader(scratch.read, size, wanted)
        for top, bottom in split_rows(wanted.height, BAND_PX):
            yield read(top, bottom, 0, wanted.width)
