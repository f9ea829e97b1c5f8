"""Tiled TIFF, written tile by tile."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from linfusion_cli.core.atomic_file import AtomicFile
from linfusion_cli.core.errors import Unavailable
from linfusion_cli.images.metadata.metadata import DIGITS_AT, ImageInfo, request_json, srgb_profile
from linfusion_cli.images.metadata.xmp import xmp_packet
from linfusion_cli.images.write import ifd
from linfusion_cli.images.write.block_sink import RowStream
from linfusion_cli.images.write.deflate import zlib_stream
from linfusion_cli.images.write.jpeg import encode_jpeg

TILE_PX = 512
DESCRIPTION = 270
RGB, YCBCR = 2, 6


@dataclass(frozen=True)
class Codec:
    """How a tile `[H, W, 3]` becomes bytes: TIFF's tag 259, whether tag 317 is horizontal, the encoder."""

    tag: int
    predictor: bool
    encode: Callable[[np.ndarray], bytes]


class TiffSink(RowStream):
    """Writes 8 or 16 bit RGB TIFF in tiles of 512 px, less for smaller pictures (TIFF 6.0; BigTIFF above 4 GiB); see
    RowSink.

    The tiles come first and the directory last, so nothing about the file has to be known before it is finished.
    `compression` is deflate, zstd, lzw, jpeg (8 bit only) or none. Tiles past the border repeat the last pixel, which
    costs nothing and gives JPEG no edge to ring at.
    """

    def __init__(
        self,
        pending: AtomicFile,
        size_px: tuple[int, int],
        bits: int,
        info: ImageInfo,
        compression: str = "deflate",
        jpeg_quality: int = 95,
        threads: int | None = None,
    ):
        self._tile_px = tile_px(size_px)
        super().__init__(pending, size_px, bits, self._tile_px[1], threads)
        self._codec = codec(compression, jpeg_quality)
        self._tile_bytes: list[int] = []
        self._tiles = self._new_tiles()
        self._begin(info)

    def _begin(self, info: ImageInfo) -> None:
        self._tags = self._fixed_tags(info)  # now: nothing may turn out to be unwritable after hours of work
        self._pending.write(bytes(ifd.HEADER_BYTES))

    def _new_tiles(self) -> list[np.ndarray]:
        """One array per tile, so that each is freed as soon as it is encoded."""
        across, down = self._tile_px
        return [np.empty((down, across, 3), f"<u{self.bits // 8}") for _ in range(0, self.width_px, across)]

    def _store(self, rows: np.ndarray, at: int) -> None:
        across = self._tile_px[0]
        for index, tile in enumerate(self._tiles):
            part = rows[:, index * across : (index + 1) * across]
            tile[at : at + len(part), : part.shape[1]] = part

    def _submit(self, count: int) -> None:
        across = self._tile_px[0]
        for left in range(0, self.width_px, across):
            tile = self._tiles.pop(0)  # the pool holds the only reference
            self._pool.submit(_encode, self._codec, tile, count, min(across, self.width_px - left))
        self._tiles = self._new_tiles()

    def _collect(self, encoded: bytes) -> None:
        self._tile_bytes.append(len(encoded))
        self._append(encoded)

    def _finish(self) -> None:
        self._append(bytes(-self._pending.position % 8))
        header, directory, places = ifd.directory(self._tags | self._tile_tags(), self._pending.position)
        self._append(directory)
        self._digits_at = places[DESCRIPTION] + DIGITS_AT
        self._pending.write_at(0, header)
        self._sha256.update(header.ljust(ifd.HEADER_BYTES, b"\0"))

    def _seal(self, digits: str) -> None:
        self._pending.write_at(self._digits_at, digits.encode())

    def _tile_tags(self) -> dict[int, ifd.Entry]:
        offsets = np.cumsum([ifd.HEADER_BYTES, *self._tile_bytes]).tolist()[:-1]
        return {324: ifd.longs(offsets), 325: ifd.longs(self._tile_bytes)}

    def _fixed_tags(self, info: ImageInfo) -> dict[int, ifd.Entry]:
        jpeg = self._codec.tag == 7
        tags = {
            256: ifd.longs([self.width_px]),
            257: ifd.longs([self.height_px]),
            258: ifd.shorts(*[self.bits] * 3),
            259: ifd.shorts(self._codec.tag),
            262: ifd.shorts(YCBCR if jpeg else RGB),
            DESCRIPTION: ifd.ascii_text(request_json(info)),
            277: ifd.shorts(3),
            282: ifd.rational(info.dpi),
            283: ifd.rational(info.dpi),
            284: ifd.shorts(1),
            296: ifd.shorts(2),  # per inch
            305: ifd.ascii_text(info.software),
            322: ifd.longs([self._tile_px[0]]),
            323: ifd.longs([self._tile_px[1]]),
            700: ifd.blob(xmp_packet(info), ifd.BYTE),
            34675: ifd.blob(srgb_profile(), ifd.UNDEFINED),
        }
        if self._codec.predictor:
            tags[317] = ifd.shorts(2)
        if jpeg:
            tags[530] = ifd.shorts(1, 1)  # no chroma subsampling
        return tags


def tile_px(size_px: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the tiles: 512, or the side in multiples of 16, as libvips refuses tiles much larger than the
    picture."""
    width_px, height_px = (min(TILE_PX, -(-side // 16) * 16) for side in size_px)
    return width_px, height_px


def codec(compression: str, jpeg_quality: int) -> Codec:
    """Raises Unavailable when the library for zstd or LZW is not installed."""
    if compression == "none":
        return Codec(1, False, np.ndarray.tobytes)
    if compression == "deflate":
        return Codec(8, True, zlib_stream)
    if compression == "jpeg":
        return Codec(7, False, partial(encode_jpeg, quality=jpeg_quality))
    try:
        import imagecodecs
    except ImportError as error:
        raise Unavailable(f"{compression} needs imagecodecs.", "pip install imagecodecs, or use deflate.") from error
    if compression == "zstd":
        return Codec(50000, True, partial(imagecodecs.zstd_encode, level=1))
    return Codec(5, True, imagecodecs.lzw_encode)


def _encode(codec: Codec, tile: np.ndarray, rows: int, columns: int) -> bytes:
    tile[:, columns:] = tile[:, columns - 1 : columns]
    tile[rows:] = tile[rows - 1]
    if codec.predictor:
        flat = tile.reshape(len(tile), -1)
        flat[:, 3:] = flat[:, 3:] - flat[:, :-3]
    return codec.encode(tile)
