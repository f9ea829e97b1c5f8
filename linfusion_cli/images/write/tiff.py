"""Streaming writer of tiled TIFF (TIFF 6.0, and BigTIFF above 4 GiB)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from linfusion_cli.core.errors import Unavailable
from linfusion_cli.images.metadata.metadata import CHECKSUM_OFFSET, ImageInfo, build_srgb_profile, serialize_request
from linfusion_cli.images.metadata.xmp import build_xmp_packet
from linfusion_cli.images.write import ifd
from linfusion_cli.images.write.block_sink import EncodedSink, SinkOptions
from linfusion_cli.images.write.deflate import compress_zlib
from linfusion_cli.images.write.jpeg import encode_jpeg

TILE_PX = 512
DESCRIPTION_TAG = 270
RGB, YCBCR = 2, 6


@dataclass(frozen=True)
class Codec:
    """A compression of tiles [H, W, 3].

    tag: the value of Compression (259); predictor: whether Predictor (317) is horizontal differencing.
    """

    tag: int
    predictor: bool
    encode: Callable[[np.ndarray], bytes]


class TiffSink(EncodedSink):
    """Writes 8 or 16 bit RGB in tiles of 512 px, less for smaller images; see RowSink.

    The tiles are written first and the directory last, because it contains their sizes. Tiles at the border are padded
    by repetition of the last pixel, which compresses well and avoids ringing in JPEG tiles.
    """

    def __init__(self, options: SinkOptions):
        self._tile_px = compute_tile_size(options.size_px)
        super().__init__(options, self._tile_px[1])
        self._codec = create_codec(options.compression, options.jpeg_quality)
        self._tile_bytes: list[int] = []
        self._tiles = self._create_tiles()
        self._write_header(options.info)

    def _write_header(self, info: ImageInfo) -> None:
        self._tags = self._build_fixed_tags(info)  # here, because invalid metadata must fail before hours of work
        self._file.write(bytes(ifd.HEADER_BYTES))

    def _create_tiles(self) -> list[np.ndarray]:
        """Return one array per tile, which is freed as soon as the tile is encoded."""
        across, down = self._tile_px
        return [np.empty((down, across, 3), f"<u{self.bits // 8}") for _ in range(0, self.width_px, across)]

    def _copy_rows(self, rows: np.ndarray, start: int) -> None:
        across = self._tile_px[0]
        for index, tile in enumerate(self._tiles):
            part = rows[:, index * across : (index + 1) * across]
            tile[start : start + len(part), : part.shape[1]] = part

    def _finish_block(self, count: int) -> None:
        across = self._tile_px[0]
        for left in range(0, self.width_px, across):
            tile = self._tiles.pop(0)  # the pool holds the only reference
            self._pool.submit(_encode_tile, self._codec, tile, count, min(across, self.width_px - left))
        self._tiles = self._create_tiles()

    def _write_block(self, encoded: bytes) -> None:
        self._tile_bytes.append(len(encoded))
        self._append(encoded)

    def _write_trailer(self) -> None:
        self._append(bytes(-self._file.position % 8))
        header, directory, offsets = ifd.build_directory(self._tags | self._build_tile_tags(), self._file.position)
        self._append(directory)
        self._checksum_offset = offsets[DESCRIPTION_TAG] + CHECKSUM_OFFSET
        self._file.write_at(0, header)
        self._sha256.update(header.ljust(ifd.HEADER_BYTES, b"\0"))

    def _write_checksum(self, digits: str) -> None:
        self._file.write_at(self._checksum_offset, digits.encode())

    def _build_tile_tags(self) -> dict[int, ifd.Entry]:
        offsets = np.cumsum([ifd.HEADER_BYTES, *self._tile_bytes]).tolist()[:-1]
        return {324: ifd.encode_longs(offsets), 325: ifd.encode_longs(self._tile_bytes)}

    def _build_fixed_tags(self, info: ImageInfo) -> dict[int, ifd.Entry]:
        jpeg = self._codec.tag == 7
        tags = {
            256: ifd.encode_longs([self.width_px]),
            257: ifd.encode_longs([self.height_px]),
            258: ifd.encode_shorts(*[self.bits] * 3),
            259: ifd.encode_shorts(self._codec.tag),
            262: ifd.encode_shorts(YCBCR if jpeg else RGB),
            DESCRIPTION_TAG: ifd.encode_ascii(serialize_request(info)),
            277: ifd.encode_shorts(3),
            282: ifd.encode_rational(info.dpi),
            283: ifd.encode_rational(info.dpi),
            284: ifd.encode_shorts(1),
            296: ifd.encode_shorts(2),  # per inch
            305: ifd.encode_ascii(info.software),
            322: ifd.encode_longs([self._tile_px[0]]),
            323: ifd.encode_longs([self._tile_px[1]]),
            700: ifd.encode_bytes(build_xmp_packet(info), ifd.BYTE),
            34675: ifd.encode_bytes(build_srgb_profile(), ifd.UNDEFINED),
        }
        if self._codec.predictor:
            tags[317] = ifd.encode_shorts(2)
        if jpeg:
            tags[530] = ifd.encode_shorts(1, 1)  # no chroma subsampling
        return tags


def compute_tile_size(size_px: tuple[int, int]) -> tuple[int, int]:
    """Return width and height of the tiles: 512, or for smaller images the side rounded up to a multiple of 16.

    libvips rejects tiles that are much larger than the image.
    """
    width_px, height_px = (min(TILE_PX, -(-side // 16) * 16) for side in size_px)
    return width_px, height_px


def create_codec(compression: str, jpeg_quality: int) -> Codec:
    """Return the codec; raise Unavailable if the library for zstd or LZW is not installed."""
    if compression == "none":
        return Codec(1, False, np.ndarray.tobytes)
    if compression == "deflate":
        return Codec(8, True, compress_zlib)
    if compression == "jpeg":
        return Codec(7, False, partial(encode_jpeg, quality=jpeg_quality))
    try:
        import imagecodecs
    except ImportError as error:
        message = f"--compression {compression} requires imagecodecs, which is not installed."
        raise Unavailable(message, "Run `pip install imagecodecs`, or use --compression deflate.") from error
    # imagecodecs declares no arrays as input.
    if compression == "zstd":
        return Codec(50000, True, partial(cast("Callable[..., bytes]", imagecodecs.zstd_encode), level=1))
    return Codec(5, True, cast("Callable[..., bytes]", imagecodecs.lzw_encode))


def _encode_tile(codec: Codec, tile: np.ndarray, rows: int, columns: int) -> bytes:
    tile[:, columns:] = tile[:, columns - 1 : columns]
    tile[rows:] = tile[rows - 1]
    if codec.predictor:
        flat = tile.reshape(len(tile), -1)
        flat[:, 3:] = flat[:, 3:] - flat[:, :-3]
    return codec.encode(tile)
