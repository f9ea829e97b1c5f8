"""The files of a run, held from its beginning and complete at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from linfusion_cli import __version__, images
from linfusion_cli.errors import LinfusionError, WriteFailed
from linfusion_cli.request import GenerateRequest


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
def opened_outputs(request: GenerateRequest) -> Iterator[images.RowSink]:
    """The output and the preview, held under temporary names; what was not closed by the end is gone."""
    picture = _open_output(request)
    try:
        outputs = Outputs(picture, _open_preview(request) if request.preview else None)
    except BaseException:
        picture.abort()
        raise
    try:
        yield outputs
    finally:
        outputs.abort()


def _open_output(request: GenerateRequest) -> images.RowSink:
    return images.open_sink(
        request.output,
        images.format_for(request.output, request.format),
        request.size.pair,
        request.bits,
        picture_info(request),
        compression=request.compression,
        overwrite=request.overwrite,
    )


def _open_preview(request: GenerateRequest) -> images.RowSink:
    info = picture_info(request)
    return images.PreviewSink(request.preview, request.size.pair, request.bits, info, overwrite=request.overwrite)


def picture_info(request: GenerateRequest) -> images.PictureInfo:
    """What the file says of itself: the full request, and the same in the layouts that other programs read."""
    software = f"linfusion {__version__}"
    parameters = images.a1111_parameters(
        request.prompt,
        request.negative_prompt,
        steps=request.steps,
        sampler="Euler",
        cfg_scale=request.guidance_scale,
        seed=request.seed,
        size_px=request.size.pair,
        model=request.model,
        version=software,
    )
    info = images.PictureInfo(
        software, request.dpi, request.to_json(), request.prompt, request.negative_prompt, parameters
    )
    return info if request.prompt_metadata else images.without_prompt(info)
