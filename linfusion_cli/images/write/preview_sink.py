"""A reduced preview, computed from the rows of the full image."""

import os

import numpy as np

from linfusion_cli.core.atomic_file import AtomicFile
from linfusion_cli.images.metadata.metadata import ImageInfo
from linfusion_cli.images.write.block_sink import BlockSink
from linfusion_cli.images.write.registry import open_sink, resolve_format

BAND_ROWS = 64
MAX_SIDE_PX = 2048


def compute_preview_size(size_px: tuple[int, int], max_side_px: int = MAX_SIDE_PX) -> tuple[int, int]:
    """Return width and height of the preview of an image of `size_px`."""
    scale = min(1.0, max_side_px / max(size_px))
    width_px, height_px = (max(1, round(side * scale)) for side in size_px)
    return width_px, height_px


class PreviewSink(BlockSink):
    """Reduces an image of `size_px` to at most `max_side_px` per side; see RowSink.

    Each band of rows is reduced by box averages of an integer factor (Pillow's `reduce`; boxes at the border average
    the pixels inside the image). `close` resizes the result by the remaining factor of 1 to 2. Memory: the reduced
    image, under `4 * max_side_px**2` pixels, and one band. The format, 8-bit JPEG, PNG or TIFF, follows from the
    suffix. The constructor raises the errors of `open_sink`.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | AtomicFile,
        size_px: tuple[int, int],
        bits: int,
        info: ImageInfo,
        max_side_px: int = MAX_SIDE_PX,
        overwrite: bool = False,
    ):
        self._factor = max(1, max(size_px) // max_side_px)
        super().__init__(size_px, bits, self._factor * max(1, BAND_ROWS // self._factor))
        self.preview_size_px = compute_preview_size(size_px, max_side_px)
        width_px, height_px = (-(-side // self._factor) for side in size_px)
        self._reduced = np.empty((height_px, width_px, 3), np.uint8)
        self._band = np.empty((self.block_rows, self.width_px, 3), np.uint8)
        format = resolve_format(target.target if isinstance(target, AtomicFile) else target)
        self._sink = open_sink(target, format, self.preview_size_px, 8, info, overwrite=overwrite)

    def update_info(self, info: ImageInfo) -> None:
        """See RowSink; also possible after the first rows, because the file is written by `close`."""
        self._sink.update_info(info)

    def _copy_rows(self, rows: np.ndarray, start: int) -> None:
        self._band[start : start + len(rows)] = rows >> (self.bits - 8)

    def _finish_block(self, count: int) -> None:
        from PIL import Image

        top = (self._row - count) // self._factor
        band = np.asarray(Image.fromarray(self._band[:count]).reduce(self._factor))
        self._reduced[top : top + len(band)] = band

    def _complete_file(self) -> None:
        self._sink.write(self._resize_to_preview())
        self._reduced = np.empty(0)
        self._sink.close()

    def _discard_file(self) -> None:
        self._sink.abort()

    def _resize_to_preview(self) -> np.ndarray:
        """Resize the part of the reduced image that is inside the image: the last boxes can exceed its border."""
        from PIL import Image

        width, height = self.width_px / self._factor, self.height_px / self._factor
        if (width, height) == self.preview_size_px:
            return self._reduced
        reduced = Image.fromarray(self._reduced)
        return np.asarray(reduced.resize(self.preview_size_px, Image.Resampling.BOX, (0, 0, width, height)))
