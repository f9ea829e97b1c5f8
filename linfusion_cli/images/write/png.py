"""Streaming PNG writer (ISO/IEC 15948).

Pillow and most other PNG encoders need the whole image in memory. This writer takes rows as they are computed and
compresses blocks of them in threads.
"""

import struct
import zlib

import numpy as np

from linfusion_cli.images.metadata.metadata import (
    CHECKSUM_OFFSET,
    ImageInfo,
    encode_utf8,
    insert_checksum,
    serialize_request,
)
from linfusion_cli.images.metadata.xmp import build_xmp_packet
from linfusion_cli.images.write.block_sink import EncodedSink, SinkOptions
from linfusion_cli.images.write.deflate import adler32, combine_adler32, crc32, deflate_part

BLOCK_BYTES = 3 << 19  # 32 rows of 16384 RGB pixels; resetting the deflate window at this distance costs no size
SIGNATURE = b"\x89PNG\r\n\x1a\n"
ZLIB_HEADER = b"\x78\x01"
LAST_BLOCK = b"\x03\x00"  # an empty, final deflate block
SUB, UP = 1, 2
PERCEPTUAL = b"\x00"
REQUEST_KEYWORD = "linfusion"
UNCOMPRESSED = b"\0\0\0\0\0"  # end of the keyword; no compression, language or translation (section 11.3.3.4)
CHECKSUM_OFFSET_IN_CHUNK = 8 + len(REQUEST_KEYWORD) + len(UNCOMPRESSED) + CHECKSUM_OFFSET


class PngSink(EncodedSink):
    """Writes 8 or 16 bit RGB; see RowSink.

    Each block is filtered and deflated in a thread and becomes one IDAT chunk. Z_SYNC_FLUSH ends each block at a byte
    boundary, which makes the concatenated blocks one deflate stream; its Adler-32 is combined from those of the blocks.
    """

    def __init__(self, options: SinkOptions):
        self._row_bytes = options.size_px[0] * 3 * options.bits // 8
        super().__init__(options, max(1, BLOCK_BYTES // self._row_bytes))
        self._adler = adler32(b"")
        self._block = self._create_block()
        self._block[0] = 0  # the filter of the first row refers to a row of zeros (section 9.2)
        self._write_header(options.info)

    def _write_header(self, info: ImageInfo) -> None:
        head = _build_header((self.width_px, self.height_px), self.bits, info)
        self._request, self._request_offset = serialize_request(info), len(head)
        request_chunk = _build_itxt(REQUEST_KEYWORD, self._request.encode())
        self._append(head + request_chunk + _build_chunks_after_request(info))

    def _create_block(self) -> np.ndarray:
        """Return an empty block of big-endian samples; row 0 is for the last row of the previous block (filter Up)."""
        return np.empty((self.block_rows + 1, self.width_px, 3), f">u{self.bits // 8}")

    def _copy_rows(self, rows: np.ndarray, start: int) -> None:
        self._block[1 + start : 1 + start + len(rows)] = rows

    def _finish_block(self, count: int) -> None:
        full, self._block = self._block, self._create_block()
        self._block[0] = full[count]
        raw = full[: count + 1].view(np.uint8).reshape(count + 1, self._row_bytes)
        self._pool.submit(_encode_block, raw, self.bits // 8 * 3)

    def _write_block(self, encoded: tuple[bytes, int, int]) -> None:
        chunk, adler, filtered_bytes = encoded
        self._adler = combine_adler32(self._adler, adler, filtered_bytes)
        self._append(chunk)

    def _write_trailer(self) -> None:
        end_of_stream = LAST_BLOCK + struct.pack(">I", self._adler)
        self._append(_build_chunk(b"IDAT", end_of_stream) + _build_chunk(b"IEND", b""))

    def _write_checksum(self, digits: str) -> None:
        """Rewrite the whole chunk, because its CRC depends on the digits."""
        request = insert_checksum(self._request, digits).encode()
        self._file.write_at(self._request_offset, _build_itxt(REQUEST_KEYWORD, request))


def _encode_block(raw: np.ndarray, pixel_bytes: int) -> tuple[bytes, int, int]:
    filtered = _filter_rows(raw, pixel_bytes)
    return _build_chunk(b"IDAT", deflate_part(filtered)), adler32(filtered.data), filtered.nbytes


def _filter_rows(raw: np.ndarray, pixel_bytes: int) -> np.ndarray:
    """Filter all rows except the first with Up or Sub, the one with the smaller estimate for a sample of rows."""
    out = np.empty((len(raw) - 1, 1 + raw.shape[1]), np.uint8)
    step = max(1, len(out) // 4)
    sample, above = raw[1::step], raw[:-1:step]
    if _estimate_size(sample - above) <= _estimate_size(sample[:, pixel_bytes:] - sample[:, :-pixel_bytes]):
        out[:, 0] = UP
        np.subtract(raw[1:], raw[:-1], out=out[:, 1:])
    else:
        out[:, 0] = SUB
        out[:, 1 : 1 + pixel_bytes] = raw[1:, :pixel_bytes]
        np.subtract(raw[1:, pixel_bytes:], raw[1:, :-pixel_bytes], out=out[:, 1 + pixel_bytes :])
    return out


def _estimate_size(residue: np.ndarray) -> int:
    """Estimate the compressed size by the usual PNG heuristic: the sum of absolute values of signed bytes."""
    return int(np.minimum(residue, 0 - residue).sum(dtype=np.int64))


def _build_header(size_px: tuple[int, int], bits: int, info: ImageInfo) -> bytes:
    per_metre = min(max(round(info.dpi / 0.0254), 1), 2**31 - 1)
    chunks = [
        _build_chunk(b"IHDR", struct.pack(">IIBBBBB", *size_px, bits, 2, 0, 0, 0)),
        _build_chunk(b"sRGB", PERCEPTUAL),
        _build_chunk(b"pHYs", struct.pack(">IIB", per_metre, per_metre, 1)),
        _build_itxt("XML:com.adobe.xmp", build_xmp_packet(info)),
    ]
    return SIGNATURE + b"".join(chunks)


def _build_chunks_after_request(info: ImageInfo) -> bytes:
    parameters = _build_itxt("parameters", encode_utf8(info.parameters)) if info.parameters else b""
    return parameters + _build_chunk(b"IDAT", ZLIB_HEADER)


def _build_itxt(keyword: str, text: bytes) -> bytes:
    return _build_chunk(b"iTXt", keyword.encode("latin-1") + UNCOMPRESSED + text)


def _build_chunk(kind: bytes, data: bytes) -> bytes:
    crc = crc32(data, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", crc)))
