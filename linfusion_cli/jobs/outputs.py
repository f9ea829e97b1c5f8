"""The files of a run, held from its beginning and complete at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from linfusion_cli import __version__, images
from linfusion_cli.errors import LinfusionError, WriteFailed
from linfusion_cli.geometry import Size
from linfusion_cli.jobs.prepare import Prepared, saved_sizes
from linfusion_cli.request import PictureRequest

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


class Outputs:
    """The picture's file and its preview as one RowSink. A preview that fails does not take the picture with it."""

    def __init__(self, picture: images.RowSink, preview: images.RowSink | None):
        self._picture, self._preview = picture, preview
        self._preview_error: LinfusionError | None = None

    def write(self, rows: np.ndarray) -> None:
        self._picture.write(rows)
        with self._excused():
            if self._preview:
                self._preview.write(rows)

    def close(self) -> None:
        self._picture.close()
        with self._excused():
            if self._preview:
                self._preview.close()
        if self._preview_error:
            raise WriteFailed(f"The picture is complete, but its preview is not: {self._preview_error}")

    def abort(self) -> None:
        self._picture.abort()
        if self._preview:
            self._preview.abort()

    @contextmanager
    def _excused(self) -> Iterator[None]:
        try:
            yield
        except LinfusionError as error:
            self._preview, self._preview_error = None, error  # a sink that raised has cleaned up after itself


@contextmanager
def opened_outputs(request: PictureRequest) -> Iterator[images.RowSink]:
    """The output and the preview, held under temporary names; what was not closed by the end is gone."""
    picture = _open_picture(request, request.output, request.size)
    try:
        outputs = Outputs(picture, _open_preview(request) if request.preview else None)
    except BaseException:
        picture.abort()
        raise
    try:
        yield outputs
    finally:
        outputs.abort()


@contextmanager
def opened_phases(prepared: Prepared) -> Iterator[dict[int, images.RowSink]]:
    """Of the phases whose pictures are to be kept, their files: held from now on, complete when the phase is."""
    request, sinks = prepared.request, {}
    try:
        if request.save_phases:
            for phase, size in zip(prepared.phases, saved_sizes(prepared), strict=False):
                sinks[phase.index] = _open_picture(request, phase_path(request.output, size), size)
        yield sinks
    finally:
        for sink in sinks.values():
            sink.abort()  # one that is complete stays


def phase_path(output: Path, size: Size) -> Path:
    """Where a phase's picture is kept: valley.tif -> valley-2048x2048.tif."""
    return output.with_name(f"{output.stem}-{size}{output.suffix}")


def _open_picture(request: PictureRequest, path: Path, size: Size) -> images.RowSink:
    return images.open_sink(
        path,
        images.format_for(path, request.format),
        size.pair,
        request.bits,
        picture_info(request, size),
        compression=request.compression,
        overwrite=request.overwrite,
    )


def _open_preview(request: PictureRequest) -> images.RowSink:
    info = picture_info(request, request.size)
    return images.PreviewSink(request.preview, request.size.pair, request.bits, info, overwrite=request.overwrite)


def picture_info(request: PictureRequest, size: Size) -> images.PictureInfo:
    """What a file of this size says of itself: the full request, and the same in the layouts that others read."""
    software = f"linfusion {__version__}"
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
        more={} if request.clip_skip is None else {"Clip skip": request.clip_skip},
    )
    info = images.PictureInfo(
        software, request.dpi, request.to_json(), request.prompt, request.negative_prompt, parameters
    )
    return info if request.prompt_metadata else images.without_prompt(info)
