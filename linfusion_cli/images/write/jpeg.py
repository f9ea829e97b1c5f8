"""JPEG, written strip by strip."""

import io
import struct
from collections.abc import Iterator

import numpy as np

from linfusion_cli.core.atomic_file import AtomicFile
from linfusion_cli.core.errors import UsageError
from linfusion_cli.images.metadata.metadata import DIGITS_AT, ImageInfo, request_json, srgb_profile
from linfusion_cli.images.metadata.xmp import xmp_packet
from linfusion_cli.images.write.block_sink import RowStream

MAX_SIDE_PX = 65_500  # the format ends at 65,535, libjpeg (so every reader) at 65,500
STRIP_ROWS = 64  # eight rows of 8 x 8 blocks: restart markers count from 0 to 7 and begin again
LAST_RESTART = b"\xff\xd7"
END = b"\xff\xd9"
SEGMENT_BYTES = 65_533
DQT, SOF0, DHT, DRI, SOS, COM = 0xDB, 0xC0, 0xC4, 0xDD, 0xDA, 0xFE
APP0, APP1, APP2 = 0xE0, 0xE1, 0xE2
XMP_NAME = b"http://ns.adobe.com/xap/1.0/\0"
COMMENT_NAME = b"linfusion\0"
DIGITS_IN_COMMENT = 4 + len(COMMENT_NAME) + DIGITS_AT  # from the marker on


class JpegSink(RowStream):
    """Writes 8 bit RGB as baseline JPEG (ITU-T T.81), 4:4:4, at most 65,500 px a side; see RowSink.

    libjpeg encodes each 64 rows for itself, with the same tables and a restart marker after every row of blocks. As a
    marker resets the coder (T.81 F.1.1.5), the strips' data joined, with RST7 between them, are the data of the whole
    picture.
    """

    def __init__(
        self,
        pending: AtomicFile,
        size_px: tuple[int, int],
        info: ImageInfo,
        quality: int = 95,
        threads: int | None = None,
    ):
        super().__init__(pending, size_px, 8, STRIP_ROWS, threads)
        self._quality = quality
        self._begin(info)
        self._strip = self._new_strip()

    def _begin(self, info: ImageInfo) -> None:
        """The head is written with the tables of the first strip."""
        head = _head(info)
        self._digits_at = len(head) + DIGITS_IN_COMMENT
        self._head: bytes | None = head + _comments(info)

    def _new_strip(self) -> np.ndarray:
        return np.empty((self.block_rows, self.width_px, 3), np.uint8)

    def _store(self, rows: np.ndarray, at: int) -> None:
        self._strip[at : at + len(rows)] = rows

    def _submit(self, count: int) -> None:
        full, self._strip = self._strip, self._new_strip()
        self._pool.submit(encode_jpeg, full[:count], self._quality, True)

    def _collect(self, encoded: bytes) -> None:
        tables, scan = _split(encoded, self.height_px)
        if self._head is None:
            self._append(LAST_RESTART)
        else:
            self._append(self._head + tables)
            self._head = None
        self._append(scan)

    def _finish(self) -> None:
        self._append(END)

    def _seal(self, digits: str) -> None:
        self._pending.write_at(self._digits_at, digits.encode())


def check_jpeg_size(size_px: tuple[int, int]) -> None:
    """Raises UsageError for a picture that no JPEG can hold."""
    if max(size_px) > MAX_SIDE_PX:
        size = f"{size_px[0]}x{size_px[1]}"
        raise UsageError(f"JPEG ends at {MAX_SIDE_PX} px a side, {size} is larger.", "Use --format tiff or png.")


def encode_jpeg(rows: np.ndarray, quality: int, restarts: bool = False) -> bytes:
    """`[H, W, 3]` uint8 -> a JPEG with the standard Huffman tables and no chroma subsampling."""
    from PIL import Image

    image, file = Image.fromarray(rows), io.BytesIO()
    options = {"restart_marker_rows": 1} if restarts else {}
    image.save(file, "JPEG", quality=quality, subsampling=0, optimize=False, **options)
    return file.getvalue()


def segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end in bytes of each segment, from SOI to the first SOS; raises ValueError."""
    at, marker = 2, 0
    while marker != SOS:
        while jpeg[at : at + 2] == b"\xff\xff":  # T.81 B.1.1.2 allows any number of these before a marker
            at += 1
        if jpeg[at : at + 1] != b"\xff" or at + 4 > len(jpeg):
            raise ValueError(f"there is no segment at byte {at}")
        marker = jpeg[at + 1]
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        yield marker, at, end
        at = end


def _split(jpeg: bytes, height_px: int) -> tuple[bytes, memoryview]:
    """The tables, for a picture of `height_px`, and the entropy-coded data."""
    tables, end = bytearray(), 0
    for marker, begin, end in segments(jpeg):
        if marker in (DQT, SOF0, DHT, DRI, SOS):
            segment = bytearray(jpeg[begin:end])
            if marker == SOF0:
                segment[5:7] = struct.pack(">H", height_px)
            tables += segment
    return bytes(tables), memoryview(jpeg)[end : -len(END)]


def _head(info: ImageInfo) -> bytes:
    """SOI and metadata. A segment holds 64 KiB: longer XMP or Exif, which a prompt of 20,000 words would need, is
    written without that prompt."""
    density = min(max(round(info.dpi), 1), 65_535)
    return b"".join(
        [
            b"\xff\xd8",
            _segment(APP0, struct.pack(">5sHBHHBB", b"JFIF\0", 0x0102, 1, density, density, 0, 0)),
            _segment(APP1, _fitting(_exif(info.software, info.parameters), _exif(info.software, ""))),
            _segment(APP1, XMP_NAME + _fitting(xmp_packet(info), xmp_packet(_bare(info)))),
            _segment(APP2, b"ICC_PROFILE\0\x01\x01" + srgb_profile()),
        ]
    )


def _comments(info: ImageInfo) -> bytes:
    """The request, split over as many comments as it needs."""
    request = request_json(info).encode()
    room = SEGMENT_BYTES - len(COMMENT_NAME)
    return b"".join(_segment(COM, COMMENT_NAME + request[at : at + room]) for at in range(0, len(request), room))


def _bare(info: ImageInfo) -> ImageInfo:
    return ImageInfo(info.software, info.dpi, {}, "", "", "")


def _fitting(value: bytes, shorter: bytes) -> bytes:
    return value if len(value) + len(XMP_NAME) <= SEGMENT_BYTES else shorter


def _exif(software: str, parameters: str) -> bytes:
    """Software and UserComment, where web tools look for the parameters in a JPEG."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0131] = software.encode("ascii", errors="replace").decode()
    if parameters:
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + parameters.encode("utf-16-be", errors="replace")
    return exif.tobytes()


def _segment(marker: int, value: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(value) + 2) + value
