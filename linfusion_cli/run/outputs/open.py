"""The files of a run, held from its beginning and complete at its end."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np

from linfusion_cli import __version__, images
from linfusion_cli.core.errors import LinfusionError, WriteFailed
from linfusion_cli.core.geometry import Size
from linfusion_cli.run.inputs.phase_files import phase_path
from linfusion_cli.run.inputs.provenance import main_hash
from linfusion_cli.run.inputs.resolve import ResolvedRequest, saved_sizes
from linfusion_cli.run.outputs.existing import Provenance
from linfusion_cli.settings.request import ImageRequest

A1111_HASH_DIGITS = 10
# What the schedulers are called in the A1111 layout.
SAMPLER_NAMES = {
    "euler": "Euler",
    "euler-a": "Euler a",
    "ddim": "DDIM",
    "dpmpp-2m": "DPM++ 2M",
    "dpmpp-2m-karras": "DPM++ 2M Karras",
    "dpmpp-2m-sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
    "pndm": "PLMS",
}


class ImageAndPreview:
    """The picture's file and its preview as one RowSink. A preview that fails does not take the picture with it."""

    def __init__(self, image: images.RowSink, preview: images.RowSink | None):
        self._image, self._preview = image, preview
        self._preview_error: LinfusionError | None = None

    def write(self, rows: np.ndarray) -> None:
        self._image.write(rows)
        with self._excused():
            if self._preview:
                self._preview.write(rows)

    def update_info(self, info: images.ImageInfo) -> None:
        self._image.update_info(info)
        with self._excused():
            if self._preview:
                self._preview.update_info(info)

    def close(self) -> None:
        self._image.close()
        with self._excused():
            if self._preview:
                self._preview.close()
        if self._preview_error:
            raise WriteFailed(f"The picture is complete, but its preview is not: {self._preview_error}")

    def abort(self) -> None:
        self._image.abort()
        if self._preview:
            self._preview.abort()

    @contextmanager
    def _excused(self) -> Iterator[None]:
        try:
            yield
        except LinfusionError as error:
            self._preview, self._preview_error = None, error  # a sink that raised has cleaned up after itself


@contextmanager
def reserve_output(request: ImageRequest, made: Collection[Path]) -> Iterator[images.AtomicFile]:
    """The output from before any work; what is not complete at the end is gone.

    One that is among the files that were `made` before, of this very request, may be replaced.
    """
    format = images.format_for(request.output, request.format)
    if request.preview is not None:
        images.format_for(request.preview)
    how = request.size.pair, request.bits, request.compression, request.overwrite or request.output in made
    with images.hold(request.output, format, *how) as file:
        yield file


@contextmanager
def open_outputs(file: images.AtomicFile, making: Provenance) -> Iterator[images.RowSink]:
    """What takes the rows of the picture, and of its preview; the files say what they were made of."""
    request = making.request
    info = build_info(making, request.size)
    with ExitStack() as on_exit:
        image, preview = _open_image(request, file, request.size, info), None
        on_exit.callback(image.abort)
        if request.preview:
            replaces = making.may_go(request.preview, Size(*images.preview_size(request.size.pair)))
            pending = images.AtomicFile(request.preview, replaces)
            preview = images.PreviewSink(pending, request.size.pair, request.bits, info)
            on_exit.callback(preview.abort)
        yield ImageAndPreview(image, preview)


@contextmanager
def open_phase_files(resolved: ResolvedRequest, making: Provenance, first: int) -> Iterator[dict[int, images.RowSink]]:
    """Of the phases whose pictures are to be kept, their files: held from now on, complete when the phase is.

    An earlier run has completed those before the phase `first`.
    """
    request, sinks = resolved.request, {}
    try:
        if request.save_phases:
            for phase, size in list(zip(resolved.phases, saved_sizes(resolved), strict=False))[first:]:
                path, info = phase_path(request.output, size), build_info(making, size)
                sinks[phase.index] = _open_image(request, path, size, info, making.may_go(path, size))
        yield sinks
    finally:
        for sink in sinks.values():
            sink.abort()  # one that is complete stays


def update_metadata(
    resolved: ResolvedRequest, making: Provenance, output: images.RowSink, phases: Mapping[int, images.RowSink]
) -> None:
    """Let the files that are not complete say what `making` says now, of which the dtypes may have changed.

    Raises WriteFailed.
    """
    output.update_info(build_info(making, resolved.request.size))
    for index, sink in phases.items():
        sink.update_info(build_info(making, resolved.phases[index].size))


def reserve_latents(making: Provenance) -> AbstractContextManager[images.AtomicFile | None]:
    """The file for finished latents, if they are to be kept."""
    path = making.request.keep_latents
    return nullcontext() if path is None else images.AtomicFile(path, making.may_go(path, making.request.size))


def _open_image(
    request: ImageRequest,
    target: Path | images.AtomicFile,
    size: Size,
    info: images.ImageInfo,
    overwrite: bool = False,
) -> images.RowSink:
    return images.open_sink(
        target,
        images.format_for(request.output, request.format),
        size.pair,
        request.bits,
        info,
        compression=request.compression,
        overwrite=overwrite,
    )


def build_info(making: Provenance, size: Size) -> images.ImageInfo:
    """What a file of this size says of itself: the full request and its weights, and the same as others read it."""
    request, software = making.request, f"linfusion {__version__}"
    parameters = images.a1111_parameters(
        request.prompt,
        request.negative_prompt,
        steps=request.steps[0],
        sampler=SAMPLER_NAMES[request.scheduler],
        cfg_scale=request.guidance_scale[0],
        seed=request.seed,
        size_px=size.pair,
        model=request.model,
        version=software,
        model_hash=main_hash(making.weights)[:A1111_HASH_DIGITS],
        more={} if request.clip_skip is None else {"Clip skip": request.clip_skip},
    )
    info = images.ImageInfo(software, request.dpi, making.told, request.prompt, request.negative_prompt, parameters)
    return info if request.prompt_metadata else images.without_prompt(info)
