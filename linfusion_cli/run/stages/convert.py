"""Convert between latents and images strip by strip: encode, resize and decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion_cli.core.geometry import Size
from linfusion_cli.images.process.quantise import quantise
from linfusion_cli.images.process.resize import ReadRegion, resize_region
from linfusion_cli.images.process.scratch import ScratchImage
from linfusion_cli.images.read.source import SourceImage, apply_orientation, read_source_rows
from linfusion_cli.models.load.networks import Vae
from linfusion_cli.planning.vae_strategies import VaeStageKind
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.sampling.noise import draw_latent_noise
from linfusion_cli.sampling.phases import Phase
from linfusion_cli.settings.request import Request
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import DrawNoise, encode_rows
from linfusion_cli.vae.statistics import VaeStrategy


def upscale_latents(run: RunContext, vae: Vae, latents: Tensor, phase: Phase) -> Tensor:
    """Return the latents of the previous phase, upscaled to the size of `phase` in pixel or latent space."""
    previous = run.resolved.phases[phase.index - 1]
    if run.resolved.request.upscale_space == "latent":
        if run.plan.has_stage("decode", previous.index):
            deque(decode_phase(run, vae, latents, previous), maxlen=0)  # only to write the file of the phase
        return interpolate_latents(latents, phase.size.divide(run.resolved.facts.vae_factor))
    with open_scratch(run, previous.size, phase) as scratch:
        for rows in decode_phase(run, vae, latents, previous):
            scratch.append(rows)
        return encode_image(run, vae, scratch.read, previous.size, phase)


def interpolate_latents(latents: Tensor, size_lat: Size) -> Tensor:
    """Return `latents` [1, C, h, w] interpolated to `size_lat`, as in DemoFusion's published code."""
    return F.interpolate(latents, (size_lat.height, size_lat.width), mode="bicubic")


def encode_source(run: RunContext, vae: Vae, image: SourceImage) -> Tensor:
    """Return the source image, encoded as latents of the first phase."""
    first, source = run.resolved.phases[0], run.resolved.request.source
    assert source is not None  # the request that `image` is from
    stored_size, size = image.stored_size, image.size
    with open_scratch(run, stored_size, first) as scratch:
        of_phase = {"phase": first.index, "phase_name": first.name}
        with run.recorder.stage("start", size, stored_size.height, "rows", **of_phase) as stage:
            done = 0
            for rows in read_source_rows(image, source.background_rgb(), run.recorder.notify):
                scratch.append(rows)
                done += len(rows)
                stage.advance(done)
        return encode_image(run, vae, apply_orientation(scratch.read, image), size, first)


def open_scratch(run: RunContext, size: Size, phase: Phase) -> ScratchImage:
    """Open the buffer of an image that `phase` will encode: in memory if the plan has room for it, else on disk."""
    in_memory = run.plan.find_stage("start", phase.index).image_buffer_bytes > 0
    return ScratchImage(None if in_memory else run.resolved.output_folder, size.width, size.height)


def decode_phase(run: RunContext, vae: Vae, latents: Tensor, phase: Phase) -> Iterator[np.ndarray]:
    """Decode the `latents` of `phase` and yield rows [n, W, 3] in float32 between 0 and 1.

    Also write them to the file of the phase, if it has one.
    """
    done, sink = 0, run.phase_sinks.get(phase.index)
    strategy, pinned = find_vae_strategy(run, "decode", phase)
    with run.stage("decode", phase.index) as stage:
        for rows in decode_rows(vae, latents, strategy, run.recorder.notify, pinned):
            rows = rows.numpy()
            if sink is not None:
                sink.write(quantise_rows(run.resolved.request, rows, done))
            done += len(rows)
            stage.advance(done)
            with stage.pause():
                yield rows
        if sink is not None:
            sink.close()


def quantise_rows(request: Request, rows: np.ndarray, top: int) -> np.ndarray:
    """Return float rows as integers for the output file. `top` is the position of the first row in the image."""
    return quantise(rows, top, request.bits, request.seed if request.dither else None)


def encode_image(run: RunContext, vae: Vae, read: ReadRegion, size: Size, phase: Phase) -> Tensor:
    """Resize an image of `size` px to the size of `phase` and return it as latents [1, C, h, w]."""
    facts, done = run.resolved.facts, 0
    size_lat = phase.size.divide(facts.vae_factor)
    strategy, pinned = find_vae_strategy(run, "start", phase)
    latents = torch.empty(1, facts.latent_channels, size_lat.height, size_lat.width)
    read_resized = build_resized_reader(read, size, run.resolved.visible_size(phase))

    def read_tensor(*region: int) -> Tensor:
        return torch.from_numpy(read_resized(*region))

    with run.stage("start", phase.index) as stage:
        noise_rows = build_posterior_noise(run, phase.index, size_lat)
        for rows in encode_rows(vae, read_tensor, phase.size, strategy, noise_rows, run.recorder.notify, pinned):
            latents[:, :, done : done + rows.shape[2]] = rows
            done += rows.shape[2]
            stage.advance(done * facts.vae_factor)
    return latents


def find_vae_strategy(run: RunContext, kind: VaeStageKind, phase: Phase) -> tuple[VaeStrategy, int]:
    """Return the planned strategy of a start or decode stage, and its pinned memory in bytes."""
    planned = run.plan.find_stage(kind, phase.index)
    assert isinstance(planned.strategy, VaeStrategy) and planned.estimate is not None
    return planned.strategy, planned.estimate.pinned_bytes


def build_posterior_noise(run: RunContext, phase: int, size_lat: Size) -> DrawNoise | None:
    """Return the noise for sampling the VAE's posterior; None if the request uses its mean."""
    request, channels = run.resolved.request, run.resolved.facts.latent_channels
    if request.vae_latents == "mean":
        return None
    noise = draw_latent_noise(request.seed, phase, channels, size_lat.height, size_lat.width)
    return lambda top, bottom: noise[:, :, top:bottom]


def build_resized_reader(read: ReadRegion, source: Size, target: Size) -> ReadRegion:
    """Return a reader of regions of an image of size `source`, resized to `target`.

    Beyond `target` it repeats the last row and column: the sides of a phase are rounded up to multiples, and the
    padding is cropped from the final image.
    """

    def read_resized(top: int, bottom: int, left: int, right: int) -> np.ndarray:
        height, width = target.height, target.width
        inside = (min(top, height - 1), min(bottom, height), min(left, width - 1), min(right, width))
        rows = resize_region(read, source.pair, target.pair, inside)
        missing = ((0, bottom - top - rows.shape[0]), (0, right - left - rows.shape[1]), (0, 0))
        return np.pad(rows, missing, mode="edge") if missing[0][1] or missing[1][1] else rows

    return read_resized
