"""Streaming JPEG writer (ITU-T T.81)."""

import io
import mmap
import struct
from collections.abc import Iterator

import numpy as np

from linfusion_cli.core.errors import UsageError
from linfusion_cli.images.metadata.metadata import CHECKSUM_OFFSET, ImageInfo, build_srgb_profile, serialize_request
from linfusion_cli.images.metadata.xmp import build_xmp_packet
from linfusion_cli.images.write.block_sink import EncodedSink, SinkOptions

MAX_SIDE_PX = 65_500  # the limit of libjpeg and most readers; the format allows 65,535
STRIP_ROWS = 64  # eight rows of 8x8 blocks, because restart markers are numbered modulo 8
LAST_RESTART = b"\xff\xd7"
END = b"\xff\xd9"
MAX_SEGMENT_BYTES = 65_533
DQT, SOF0, DHT, DRI, SOS, COM = 0xDB, 0xC0, 0xC4, 0xDD, 0xDA, 0xFE
APP0, APP1, APP2 = 0xE0, 0xE1, 0xE2
XMP_NAME = b"http://ns.adobe.com/xap/1.0/\0"
COMMENT_NAME = b"linfusion\0"
CHECKSUM_OFFSET_IN_SEGMENT = 4 + len(COMMENT_NAME) + CHECKSUM_OFFSET  # from the marker


class JpegSink(EncodedSink):
    """Writes 8 bit RGB as baseline JPEG, 4:4:4, at most 65,500 px per side; see RowSink.

    libjpeg encodes strips of 64 rows independently, with the same tables and a restart marker after each row of blocks.
    A restart marker resets the entropy coder (T.81 F.1.1.5), therefore the concatenated data of the strips, with RST7
    in between, are the data of the whole image.
    """

    def __init__(self, options: SinkOptions):
        super().__init__(options, STRIP_ROWS)
        self._quality = options.jpeg_quality
        self._write_header(options.info)
        self._strip = self._create_strip()

    def _write_header(self, info: ImageInfo) -> None:
        """Prepare the header, which is written together with the tables of the first strip."""
        header = _build_header(info)
        self._checksum_offset = len(header) + CHECKSUM_OFFSET_IN_SEGMENT
        self._header: bytes | None = header + _build_comments(info)

    def _create_strip(self) -> np.ndarray:
        return np.empty((self.block_rows, self.width_px, 3), np.uint8)

    def _copy_rows(self, rows: np.ndarray, start: int) -> None:
        self._strip[start : start + len(rows)] = rows

    def _finish_block(self, count: int) -> None:
        full, self._strip = self._strip, self._create_strip()
        self._pool.submit(encode_jpeg, full[:count], self._quality, True)

    def _write_block(self, encoded: bytes) -> None:
        tables, scan = _split_tables_and_scan(encoded, self.height_px)
        if self._header is None:
            self._append(LAST_RESTART)
        else:
            self._append(self._header + tables)
            self._header = None
        self._append(scan)

    def _write_trailer(self) -> None:
        self._append(END)

    def _write_checksum(self, digits: str) -> None:
        self._file.write_at(self._checksum_offset, digits.encode())


def check_jpeg_size(size_px: tuple[int, int]) -> None:
    """Raise UsageError if the image is too large for JPEG."""
    if max(size_px) > MAX_SIDE_PX:
        size = f"{size_px[0]}x{size_px[1]}"
        message = f"{size} is too large for JPEG; the limit is {MAX_SIDE_PX} px per side."
        raise UsageError(message, "Use --format tiff or png.")


def encode_jpeg(rows: np.ndarray, quality: int, restarts: bool = False) -> bytes:
    """Encode [H, W, 3] uint8 as JPEG with the standard Huffman tables and without chroma subsampling."""
    from PIL import Image

    image, file = Image.fromarray(rows), io.BytesIO()
    options = {"restart_marker_rows": 1} if restarts else {}
    image.save(file, "JPEG", quality=quality, subsampling=0, optimize=False, **options)
    return file.getvalue()


def iter_segments(jpeg: bytes | mmap.mmap) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end offset of each segment from SOI to the first SOS; raise ValueError if malformed."""
    start, marker = 2, 0
    while marker != SOS:
        while jpeg[start : start + 2] == b"\xff\xff":  # fill bytes before a marker (T.81 B.1.1.2)
            start += 1
        if jpeg[start : start + 1] != b"\xff" or start + 4 > len(jpeg):
            raise ValueError(f"byte {start} is not the start of a segment")
        marker = jpeg[start + 1]
        end = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4])
        yield marker, start, end
        start = end


def _split_tables_and_scan(jpeg: bytes, height_px: int) -> tuple[bytes, bytes]:
    """Return the tables, with the height set to `height_px`, and the entropy-coded data."""
    tables, end = bytearray(), 0
    for marker, start, end in iter_segments(jpeg):
        if marker in (DQT, SOF0, DHT, DRI, SOS):
            segment = bytearray(jpeg[start:end])
            if marker == SOF0:
                segment[5:7] = struct.pack(">H", height_px)
            tables += segment
    return bytes(tables), jpeg[end : -len(END)]


def _build_header(info: ImageInfo) -> bytes:
    """Return SOI and the metadata; XMP or Exif data that exceed a segment (64 KiB) are written without the prompt."""
    density = min(max(round(info.dpi), 1), 65_535)
    exif = _choose_fitting(_build_exif(info.software, info.parameters), _build_exif(info.software, ""))
    xmp = _choose_fitting(build_xmp_packet(info), build_xmp_packet(_remove_texts(info)))
    return b"".join(
        [
            b"\xff\xd8",
            _build_segment(APP0, struct.pack(">5sHBHHBB", b"JFIF\0", 0x0102, 1, density, density, 0, 0)),
            _build_segment(APP1, exif),
            _build_segment(APP1, XMP_NAME + xmp),
            _build_segment(APP2, b"ICC_PROFILE\0\x01\x01" + build_srgb_profile()),
        ]
    )


def _build_comments(info: ImageInfo) -> bytes:
    """Return the request in one or more comment segments."""
    request = serialize_request(info).encode()
    room = MAX_SEGMENT_BYTES - len(COMMENT_NAME)
    return b"".join(
        _build_segment(COM, COMMENT_NAME + request[start : start + room]) for start in range(0, len(request), room)
    )


def _remove_texts(info: ImageInfo) -> ImageInfo:
    return ImageInfo(info.software, info.dpi, {}, "", "", "")


def _choose_fitting(value: bytes, shorter: bytes) -> bytes:
    """Return `value` if it fits into a segment, else `shorter`."""
    return value if len(value) + len(XMP_NAME) <= MAX_SEGMENT_BYTES else shorter


def _build_exif(software: str, parameters: str) -> bytes:
    """Return Exif data with the software, and the parameters in UserComment, where A1111 tools expect them."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0131] = software.encode("ascii", errors="replace").decode()
    if parameters:
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + parameters.encode("utf-16-be", errors="replace")
    return exif.tobytes()


def _build_segment(marker: int, value: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(value) + 2) + value
