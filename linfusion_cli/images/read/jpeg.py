"""Reading the segments of JPEG files (ITU-T T.81)."""

import mmap
import struct
import warnings
from pathlib import Path

from linfusion_cli.images.read.file_info import FileInfo, build_truncation_error, parse_checksum, parse_request
from linfusion_cli.images.write.jpeg import (
    APP0,
    APP1,
    CHECKSUM_OFFSET_IN_SEGMENT,
    COM,
    COMMENT_NAME,
    END,
    SOS,
    iter_segments,
)

NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # markers of tables in the range C0 to CF
FRAMES = [marker for marker in range(0xC0, 0xD0) if marker not in NOT_FRAMES]
EXIF_NAME = b"Exif\0\0"


def read_jpeg(path: Path) -> FileInfo:
    """Read a JPEG; raise DataError if it has no end marker after the image data, ValueError if it is malformed."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        values: dict[int, list[bytes]] = {}
        comments: dict[int, bytes] = {}
        end = 0
        for marker, begin, end in iter_segments(content):
            value = content[begin + 4 : end]
            values.setdefault(marker, []).append(value)
            if marker == COM and value.startswith(COMMENT_NAME):
                comments[begin] = value.removeprefix(COMMENT_NAME)
            if end > len(content):
                raise build_truncation_error(path, "its header is incomplete")
        # In entropy-coded data, 0xFF is always followed by 0 or a restart marker: a match is the end marker.
        if content.rfind(END, end) < 0:
            raise build_truncation_error(path, "it has no end marker (EOI)")
    return _build_info(path, values, comments)


def _build_info(path: Path, values: dict[int, list[bytes]], comments: dict[int, bytes]) -> FileInfo:
    frame = next((values[marker][0] for marker in FRAMES if marker in values), None)
    if frame is None or SOS not in values:
        raise ValueError("it contains no image data")
    bits, height_px, width_px = struct.unpack(">BHH", frame[:5])
    request = b"".join(comments.values()).decode(errors="replace")
    checksum = parse_checksum(request)
    return FileInfo(
        path=path,
        format="jpeg",
        width_px=width_px,
        height_px=height_px,
        bits=bits,
        tile_px=None,
        compression="jpeg",
        dpi=_parse_dpi(values.get(APP0, [b""])[0]),
        file_bytes=path.stat().st_size,
        request=parse_request(request),
        parameters=_parse_parameters(values.get(APP1, [])),
        file_sha256=checksum,
        file_sha256_at=min(comments) + CHECKSUM_OFFSET_IN_SEGMENT if checksum else None,
    )


def _parse_dpi(jfif: bytes) -> float | None:
    if not jfif.startswith(b"JFIF\0"):
        return None
    unit, density = struct.unpack(">BH", jfif[7:10])
    return {1: float(density), 2: round(density * 2.54, 2)}.get(unit)


def _parse_parameters(app1_values: list[bytes]) -> str | None:
    from PIL import Image

    data = next((value for value in app1_values if value.startswith(EXIF_NAME)), None)
    if data is None:
        return None
    exif = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged comment is ignored silently
        exif.load(data)
        comment = exif.get_ifd(0x8769).get(0x9286)
    if not isinstance(comment, bytes) or not comment.startswith(b"UNICODE\0"):
        return None
    return comment[8:].decode("utf-16-be", errors="replace")
