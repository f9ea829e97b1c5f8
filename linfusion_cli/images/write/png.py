"""PNG, written block by block."""

import struct
import zlib

import numpy as np

from linfusion_cli.core.atomic_file import AtomicFile
from linfusion_cli.images.metadata.metadata import DIGITS_AT, ImageInfo, request_json, sealed, utf8
from linfusion_cli.images.metadata.xmp import xmp_packet
from linfusion_cli.images.write.block_sink import RowStream
from linfusion_cli.images.write.deflate import adler32, adler32_combine, crc32, deflate_part

BLOCK_BYTES = 3 << 19  # 32 rows of 16384 RGB pixels: large enough that a lost window costs nothing, small in memory
SIGNATURE = b"\x89PNG\r\n\x1a\n"
ZLIB_HEADER = b"\x78\x01"
LAST_BLOCK = b"\x03\x00"  # an empty, final deflate block
SUB, UP = 1, 2
PERCEPTUAL = b"\x00"
REQUEST = "linfusion"  # the keyword of the text that holds it
UNCOMPRESSED = b"\0\0\0\0\0"  # between keyword and text (section 11.3.3.4): no compression, language or translation
DIGITS_IN_CHUNK = 8 + len(REQUEST) + len(UNCOMPRESSED) + DIGITS_AT


class PngSink(RowStream):
    """Writes 8 or 16 bit RGB PNG (ISO/IEC 15948); see RowSink.

    Each block is filtered and deflated in a thread and becomes one IDAT chunk; the blocks end with Z_SYNC_FLUSH, so
    joined they are one deflate stream, and its Adler-32 is combined from theirs. Raises CannotCreate and TryAgain as
    PendingFile does.
    """

    def __init__(
        self,
        pending: AtomicFile,
        size_px: tuple[int, int],
        bits: int,
        info: ImageInfo,
        threads: int | None = None,
    ):
        self._row_bytes = size_px[0] * 3 * bits // 8
        super().__init__(pending, size_px, bits, max(1, BLOCK_BYTES // self._row_bytes), threads)
        self._adler = adler32(b"")
        self._block = self._new_block()
        self._block[0] = 0  # the row above the first is black (section 9.2)
        self._begin(info)

    def _begin(self, info: ImageInfo) -> None:
        head = _head((self.width_px, self.height_px), self.bits, info)
        self._request, self._request_at = request_json(info), len(head)
        self._append(head + _itxt(REQUEST, self._request.encode()) + _after_request(info))

    def _new_block(self) -> np.ndarray:
        """Row 0 is the last row of the block before, which the Up filter needs; samples are big-endian."""
        return np.empty((self.block_rows + 1, self.width_px, 3), f">u{self.bits // 8}")

    def _store(self, rows: np.ndarray, at: int) -> None:
        self._block[1 + at : 1 + at + len(rows)] = rows

    def _submit(self, count: int) -> None:
        full, self._block = self._block, self._new_block()
        self._block[0] = full[count]
        raw = full[: count + 1].view(np.uint8).reshape(count + 1, self._row_bytes)
        self._pool.submit(_encode, raw, self.bits // 8 * 3)

    def _collect(self, encoded: tuple[bytes, int, int]) -> None:
        chunk, adler, filtered_bytes = encoded
        self._adler = adler32_combine(self._adler, adler, filtered_bytes)
        self._append(chunk)

    def _finish(self) -> None:
        self._append(_chunk(b"IDAT", LAST_BLOCK + struct.pack(">I", self._adler)) + _chunk(b"IEND", b""))

    def _seal(self, digits: str) -> None:
        """The whole chunk anew, as its CRC changes with the digits."""
        self._pending.write_at(self._request_at, _itxt(REQUEST, sealed(self._request, digits).encode()))


def _encode(raw: np.ndarray, pixel_bytes: int) -> tuple[bytes, int, int]:
    filtered = _filtered(raw, pixel_bytes)
    return _chunk(b"IDAT", deflate_part(filtered)), adler32(filtered), filtered.nbytes


def _filtered(raw: np.ndarray, pixel_bytes: int) -> np.ndarray:
    """Filter all rows but the first with Up or Sub, whichever leaves less on a sample of the rows."""
    out = np.empty((len(raw) - 1, 1 + raw.shape[1]), np.uint8)
    step = max(1, len(out) // 4)
    sample, above = raw[1::step], raw[:-1:step]
    if _weight(sample - above) <= _weight(sample[:, pixel_bytes:] - sample[:, :-pixel_bytes]):
        out[:, 0] = UP
        np.subtract(raw[1:], raw[:-1], out=out[:, 1:])
    else:
        out[:, 0] = SUB
        out[:, 1 : 1 + pixel_bytes] = raw[1:, :pixel_bytes]
        np.subtract(raw[1:, pixel_bytes:], raw[1:, :-pixel_bytes], out=out[:, 1 + pixel_bytes :])
    return out


def _weight(residue: np.ndarray) -> int:
    """The usual guess at compressed size: the sum of the absolute values, read as signed bytes."""
    return int(np.minimum(residue, 0 - residue).sum(dtype=np.int64))


def _head(size_px: tuple[int, int], bits: int, info: ImageInfo) -> bytes:
    per_metre = min(max(round(info.dpi / 0.0254), 1), 2**31 - 1)
    chunks = [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", *size_px, bits, 2, 0, 0, 0)),
        _chunk(b"sRGB", PERCEPTUAL),
        _chunk(b"pHYs", struct.pack(">IIB", per_metre, per_metre, 1)),
        _itxt("XML:com.adobe.xmp", xmp_packet(info)),
    ]
    return SIGNATURE + b"".join(chunks)


def _after_request(info: ImageInfo) -> bytes:
    parameters = _itxt("parameters", utf8(info.parameters)) if info.parameters else b""
    return parameters + _chunk(b"IDAT", ZLIB_HEADER)


def _itxt(keyword: str, text: bytes) -> bytes:
    return _chunk(b"iTXt", keyword.encode("latin-1") + UNCOMPRESSED + text)


def _chunk(kind: bytes, data: bytes) -> bytes:
    crc = crc32(data, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", crc)))
