"""A small picture of a large one, made from the same rows."""

import os

import numpy as np

from linfusion_cli.core.atomic_file import AtomicFile
from linfusion_cli.images.metadata.metadata import ImageInfo
from linfusion_cli.images.write.block_sink import check_rows
from linfusion_cli.images.write.registry import format_for, open_sink

BAND_ROWS = 64
MAX_SIDE_PX = 2048


def preview_size(size_px: tuple[int, int], max_side_px: int = MAX_SIDE_PX) -> tuple[int, int]:
    """Width and height of the preview of a picture of `size_px`."""
    shrink = min(1.0, max_side_px / max(size_px))
    width_px, height_px = (max(1, round(side * shrink)) for side in size_px)
    return width_px, height_px


class PreviewSink:
    """Takes the rows of a picture of `size_px` and writes it reduced to `max_side_px` at most; see RowSink.

    Bands are averaged over boxes of a whole number of pixels as they pass (Pillow's `reduce`; boxes at the border
    average what they have), and what is left between 1 and 2 is one resize at the end. Held in memory: the reduced
    picture, under `4 * max_side_px²` pixels, and a band. Written by suffix as JPEG, PNG or TIFF, 8 bit.
    Raises as `open_sink` does.
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
        self._bits = bits
        self._size_px = size_px
        self.size_px = preview_size(size_px, max_side_px)
        width_px, height_px = (-(-side // self._factor) for side in size_px)
        self._reduced = np.empty((height_px, width_px, 3), np.uint8)
        self._band = np.empty((self._factor * max(1, BAND_ROWS // self._factor), size_px[0], 3), np.uint8)
        self._row = 0
        format = format_for(target.target if isinstance(target, AtomicFile) else target)
        self._sink = open_sink(target, format, self.size_px, 8, info, overwrite=overwrite)

    def write(self, rows: np.ndarray) -> None:
        try:
            check_rows(rows, self._size_px, self._bits, self._row)
            while len(rows):
                room = len(self._band) - self._row % len(self._band)
                self._take(rows[:room])
                rows = rows[room:]
        except BaseException:
            self.abort()
            raise

    def update_info(self, info: ImageInfo) -> None:
        self._sink.update_info(info)

    def close(self) -> None:
        try:
            if self._row != self._size_px[1]:
                raise ValueError(f"{self._row} rows of {self._size_px[1]} were written")
            if self._reduced.size:
                self._sink.write(self._resized())
                self._reduced = np.empty(0)
            self._sink.close()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        self._sink.abort()

    def _take(self, part: np.ndarray) -> None:
        at = self._row % len(self._band)
        self._band[at : at + len(part)] = part >> (self._bits - 8)
        self._row += len(part)
        if at + len(part) == len(self._band) or self._row == self._size_px[1]:
            self._reduce(at + len(part))

    def _reduce(self, count: int) -> None:
        from PIL import Image

        top = (self._row - count) // self._factor
        band = np.asarray(Image.fromarray(self._band[:count]).reduce(self._factor))
        self._reduced[top : top + len(band)] = band

    def _resized(self) -> np.ndarray:
        """The last boxes may reach past the border: the resize looks only at what is inside."""
        from PIL import Image

        inside = tuple(side / self._factor for side in self._size_px)
        if inside == self.size_px:
            return self._reduced
        return np.asarray(Image.fromarray(self._reduced).resize(self.size_px, Image.Resampling.BOX, (0, 0, *inside)))
