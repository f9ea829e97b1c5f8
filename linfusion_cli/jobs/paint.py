"""The stages of a run that need torch: each takes the Run and what the stage before made."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from linfusion_cli import device as machine
from linfusion_cli.attention.mount import mounted
from linfusion_cli.attention.weights import load_weights
from linfusion_cli.errors import DataError
from linfusion_cli.geometry import Size, bands
from linfusion_cli.images import RowSink
from linfusion_cli.images.resize import resized_rows
from linfusion_cli.images.scratch import ScratchPicture
from linfusion_cli.jobs.prepare import Prepared
from linfusion_cli.jobs.record import Recorder
from linfusion_cli.models.load import load_unet, load_vae
from linfusion_cli.models.text import Conditioning, encode_prompts
from linfusion_cli.sampling import phases, schedule
from linfusion_cli.sampling.denoise import denoise
from linfusion_cli.sampling.guidance import Predict, guided
from linfusion_cli.sampling.noise import base_noise, phase_noise
from linfusion_cli.unet.predict import predictor
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import encode_rows

BAND_PX = 256  # rows resized at a time when a base is reduced to a smaller target
UNHEARD = "The prompt is too long for the model's text encoder, which did not hear its end: {!r}."


@dataclass(frozen=True)
class Run:
    """What stays the same from the first stage to the last."""

    prepared: Prepared
    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    recorder: Recorder

    @property
    def window_lat(self) -> int:
        """Side of the VAE's windows: the size it was trained at, which its attention and its statistics know best."""
        facts = self.prepared.facts
        return facts.vae_native_px // facts.vae_factor


@dataclass(frozen=True)
class Models:
    """The loaded models, as functions of what changes from step to step."""

    predict: Predict
    vae: AutoencoderKL


def begin(prepared: Prepared, recorder: Recorder) -> Run:
    """Settle where and in what number formats this run works."""
    request = prepared.request
    gc.freeze()  # what the imports made stays: collecting at each stage need not walk a million objects
    device = machine.pick_device(request.device)
    dtype = machine.pick_dtype(request.dtype, device)
    recorder.device = device
    return Run(prepared, device, dtype, machine.pick_vae_dtype(device), recorder)


def read_prompts(run: Run) -> Conditioning:
    """Both prompts as the UNet hears them; the text encoders are freed when this returns."""
    request, prepared = run.prepared.request, run.prepared
    with run.recorder.stage("prompt", "text", None, 1, "prompts"):
        conditioning = encode_prompts(
            prepared.model, prepared.facts, request.prompt, request.negative_prompt, run.dtype, run.device
        )
    if conditioning.unheard:
        run.recorder.notice(UNHEARD.format(conditioning.unheard))
    return conditioning


@contextmanager
def loaded(run: Run, conditioning: Conditioning) -> Iterator[Models]:
    """The UNet with its attention mounted, under guidance, and the VAE."""
    prepared, request = run.prepared, run.prepared.request
    with ExitStack() as stack:
        with run.recorder.stage("models", "load", None, 1, "models"):
            vae = load_vae(prepared.model, run.vae_dtype, run.device)
            unet = load_unet(prepared.model, run.dtype)
            linear = load_weights(prepared.linfusion, unet, run.dtype) if prepared.linfusion else {}
            stack.enter_context(mounted(unet, linear))
            unet.to(run.device)  # only now: what was replaced need not be on the card
        positive, negative = (
            predictor(unet, embedding.hidden, embedding.added(request.size))
            for embedding in (conditioning.positive, conditioning.negative)
        )
        yield Models(guided(positive, negative, request.guidance_scale, request.guidance_rescale), vae)


def base(run: Run, models: Models) -> Tensor:
    """Latents [1, C, h, w] of the picture at the model's native size, from noise."""
    request, facts = run.prepared.request, run.prepared.facts
    size_lat = run.prepared.sizes[0].divided(facts.vae_factor)
    noise = base_noise(request.seed, facts.latent_channels, size_lat.height, size_lat.width, run.dtype)
    scheduler = schedule.euler(facts.scheduler_config, request.steps)
    return _denoise(run, models, 0, scheduler, scheduler.timesteps, phases.base_start(scheduler, noise))


def grow(run: Run, models: Models, latents: Tensor, phase: int) -> Tensor:
    """Latents of phase - 1 -> latents of `phase`: decoded, resized, encoded, noised and denoised again (SDEdit)."""
    request, facts, sizes = run.prepared.request, run.prepared.facts, run.prepared.sizes
    strength = schedule.phase_strengths(request.strength, len(sizes) - 1)[phase - 1]
    encoded = _enlarge(run, models.vae, latents, sizes[phase - 1], sizes[phase])
    steps = schedule.steps_run(strength, request.steps)
    if steps == 0:
        return encoded
    scheduler = schedule.euler(facts.scheduler_config, request.steps)
    timesteps = schedule.last_steps(scheduler, steps)
    noise = phase_noise(request.seed, phase, *encoded.shape[1:])
    return _denoise(run, models, phase, scheduler, timesteps, phases.sdedit_start(scheduler, timesteps, encoded, noise))


def _denoise(run: Run, models: Models, phase: int, scheduler, timesteps: Tensor, latents: Tensor) -> Tensor:
    size = run.prepared.sizes[phase]
    name = f"{size.width / run.prepared.sizes[0].width:.2g}x" if phase else "base"
    with run.recorder.stage(name, "denoise", size, len(timesteps), "steps") as stage, torch.inference_mode():
        steps = denoise(latents.to(run.device), scheduler, timesteps, models.predict)
        for done, stepped in enumerate(steps, 1):
            latents = stepped
            stage.advance(done)
    return checked(latents, f"The model gave NaN in {name}.").cpu()


def checked(values: Tensor, message: str) -> Tensor:
    """`values`, or DataError if one of them is not a number: a black picture after hours helps nobody."""
    if not torch.isfinite(values).all():
        raise DataError(message, "Try --dtype float32; if that gives the same, the weights are damaged.")
    return values


def _enlarge(run: Run, vae: AutoencoderKL, latents: Tensor, size: Size, target: Size) -> Tensor:
    """Latents of a picture of `size` px -> latents of the same picture at `target` px, strip by strip."""
    with ScratchPicture(run.prepared.folder, size.width, size.height) as scratch:
        for rows in _decoded(run, vae, latents, size):
            scratch.append(rows)
        return _encoded(run, vae, scratch, target)


def _decoded(run: Run, vae: AutoencoderKL, latents: Tensor, size: Size) -> Iterator[np.ndarray]:
    """The rows [rows, W, 3] of the picture that `latents` are, as float32 between 0 and 1."""
    done = 0
    with run.recorder.stage("decode", "decode", size, size.height, "rows") as stage:
        for rows in decode_rows(vae, latents, run.window_lat):
            done += len(rows)
            stage.advance(done)
            with stage.paused():
                yield checked(rows, "The VAE gave NaN.").numpy()


def _encoded(run: Run, vae: AutoencoderKL, scratch: ScratchPicture, target: Size) -> Tensor:
    """The picture in `scratch`, resized to `target` px, as latents [1, C, h, w]."""
    read = _resized_reader(scratch, target)
    done, strips = 0, []
    with run.recorder.stage("encode", "encode", target, target.height, "rows") as stage:
        for strip in encode_rows(vae, lambda top, bottom: torch.from_numpy(read(top, bottom)), target, run.window_lat):
            strips.append(strip)
            done += strip.shape[2] * run.prepared.facts.vae_factor
            stage.advance(done)
    return checked(torch.cat(strips, dim=2), "The VAE gave NaN.")


def _resized_reader(scratch: ScratchPicture, target: Size) -> Callable[[int, int], np.ndarray]:
    """Reads rows of the picture in `scratch` as if it were `target` px."""
    source = (scratch.width, scratch.height)
    return lambda top, bottom: resized_rows(scratch.read, source, (target.width, target.height), top, bottom)


def write(run: Run, models: Models, latents: Tensor, sink: RowSink) -> None:
    """Decode `latents`, hand `sink` the rows in 8 bits, at exactly the size asked for, and complete it."""
    seconds = 0.0
    for rows in finished_rows(run, models.vae, latents):
        began = time.perf_counter()
        sink.write(np.rint(rows * 255).astype(np.uint8))
        seconds += time.perf_counter() - began
    with run.recorder.stage("write", "write", run.prepared.request.size, 1, "file", spent_sec=seconds):
        sink.close()


def finished_rows(run: Run, vae: AutoencoderKL, latents: Tensor) -> Iterator[np.ndarray]:
    """The rows of the finished picture: cropped to the size asked for, or reduced to it if that is below the base."""
    size, wanted = run.prepared.sizes[-1], run.prepared.request.size
    decoded = _decoded(run, vae, latents, size)
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
