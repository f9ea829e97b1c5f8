"""Reserve the files of a run at its start, and complete them at its end."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np

from linfusion_cli import __version__, images
from linfusion_cli.core.errors import LinfusionError, WriteFailed
from linfusion_cli.core.geometry import Size
from linfusion_cli.run.inputs.phase_files import build_phase_path
from linfusion_cli.run.inputs.provenance import find_model_hash
from linfusion_cli.run.inputs.resolve import ResolvedRequest
from linfusion_cli.run.outputs.existing import Provenance
from linfusion_cli.settings.request import Request

A1111_HASH_DIGITS = 10
# The names of the schedulers in A1111 metadata.
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
    """The image and its preview as one RowSink. If the preview fails, the image is still completed."""

    def __init__(self, image: images.RowSink, preview: images.RowSink | None):
        self._image, self._preview = image, preview
        self._preview_error: LinfusionError | None = None

    def write(self, rows: np.ndarray) -> None:
        """Write the rows to both files."""
        self._image.write(rows)
        with self._catch_preview_errors():
            if self._preview:
                self._preview.write(rows)

    def update_info(self, info: images.ImageInfo) -> None:
        """Replace the metadata of both files."""
        self._image.update_info(info)
        with self._catch_preview_errors():
            if self._preview:
                self._preview.update_info(info)

    def close(self) -> None:
        """Complete both files; raise WriteFailed if only the image is complete."""
        self._image.close()
        with self._catch_preview_errors():
            if self._preview:
                self._preview.close()
        if self._preview_error:
            raise WriteFailed(f"The image is complete, but its preview is not: {self._preview_error}")

    def abort(self) -> None:
        """Remove both files unless they are complete."""
        self._image.abort()
        if self._preview:
            self._preview.abort()

    @contextmanager
    def _catch_preview_errors(self) -> Iterator[None]:
        """Keep an error of the preview until `close`."""
        try:
            yield
        except LinfusionError as error:
            self._preview, self._preview_error = None, error  # the failed sink has removed its file


@contextmanager
def reserve_output(request: Request, existing: Collection[Path]) -> Iterator[images.AtomicFile]:
    """Reserve the output before any work, and remove it on exit unless it is complete.

    existing: files of an earlier run of the same request, which can be replaced.
    """
    format = images.resolve_format(request.execution.output, request.format)
    if request.execution.preview is not None:
        images.resolve_format(request.execution.preview)
    overwrite = request.execution.overwrite or request.execution.output in existing
    with images.create_output_file(
        request.execution.output, format, request.size.pair, request.bits, request.compression, overwrite
    ) as file:
        yield file


@contextmanager
def open_outputs(file: images.AtomicFile, provenance: Provenance) -> Iterator[images.RowSink]:
    """Open a sink for the rows of the image and of its preview, with `provenance` as their metadata."""
    request = provenance.request
    info = build_info(provenance, request.size)
    with ExitStack() as on_exit:
        image, preview = _open_image(request, file, request.size, info), None
        on_exit.callback(image.abort)
        if request.execution.preview:
            size = Size(*images.compute_preview_size(request.size.pair))
            preview_file = images.AtomicFile(
                request.execution.preview, provenance.may_replace(request.execution.preview, size)
            )
            preview = images.PreviewSink(preview_file, request.size.pair, request.bits, info)
            on_exit.callback(preview.abort)
        yield ImageAndPreview(image, preview)


@contextmanager
def open_phase_files(
    resolved: ResolvedRequest, provenance: Provenance, first: int
) -> Iterator[dict[int, images.RowSink]]:
    """Open the files of --save-phases, by phase index, from phase `first` on: earlier ones are complete.

    A file is complete when its phase is.
    """
    request, sinks = resolved.request, {}
    try:
        if request.save_phases:
            for phase, size in list(zip(resolved.phases, resolved.saved_phase_sizes, strict=False))[first:]:
                path, info = build_phase_path(request.execution.output, size), build_info(provenance, size)
                sinks[phase.index] = _open_image(request, path, size, info, provenance.may_replace(path, size))
        yield sinks
    finally:
        for sink in sinks.values():
            sink.abort()  # does nothing if the file is complete


def update_metadata(
    resolved: ResolvedRequest, provenance: Provenance, output: images.RowSink, phases: Mapping[int, images.RowSink]
) -> None:
    """Write the current dtype history of `provenance` to all files that are not complete; raise WriteFailed."""
    output.update_info(build_info(provenance, resolved.request.size))
    for index, sink in phases.items():
        sink.update_info(build_info(provenance, resolved.phases[index].size))


def reserve_latents(provenance: Provenance) -> AbstractContextManager[images.AtomicFile | None]:
    """Reserve the file of --keep-latents; return a context of None without that option."""
    path, size = provenance.request.execution.keep_latents, provenance.request.size
    return nullcontext() if path is None else images.AtomicFile(path, provenance.may_replace(path, size))


def _open_image(
    request: Request,
    target: Path | images.AtomicFile,
    size: Size,
    info: images.ImageInfo,
    overwrite: bool = False,
) -> images.RowSink:
    return images.open_sink(
        target,
        images.resolve_format(request.execution.output, request.format),
        size.pair,
        request.bits,
        info,
        compression=request.compression,
        overwrite=overwrite,
    )


def build_info(provenance: Provenance, size: Size) -> images.ImageInfo:
    """Return the metadata of a file of this size, in the format of linfusion and in that of A1111."""
    request, software = provenance.request, f"linfusion {__version__}"
    parameters = images.format_a1111_parameters(
        request.prompt,
        request.negative_prompt,
        steps=request.steps[0],
        sampler=SAMPLER_NAMES[request.scheduler],
        cfg_scale=request.guidance_scale[0],
        seed=request.seed,
        size_px=size.pair,
        model=request.model,
        version=software,
        model_hash=find_model_hash(provenance.weights)[:A1111_HASH_DIGITS],
        extra={} if request.clip_skip is None else {"Clip skip": request.clip_skip},
    )
    info = images.ImageInfo(
        software, request.dpi, provenance.as_metadata(), request.prompt, request.negative_prompt, parameters
    )
    return info if request.prompt_metadata else images.remove_prompt_metadata(info)
