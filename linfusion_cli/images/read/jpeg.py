"""JPEG files, segment by segment (ITU-T T.81)."""

import mmap
import struct
import warnings
from pathlib import Path

from linfusion_cli.images.read.file_info import FileInfo, parse_checksum, parse_request, truncated
from linfusion_cli.images.write.jpeg import APP0, APP1, COM, COMMENT_NAME, DIGITS_IN_COMMENT, END, SOS, segments

NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # the tables among the markers C0 to CF
FRAMES = [marker for marker in range(0xC0, 0xD0) if marker not in NOT_FRAMES]
EXIF_NAME = b"Exif\0\0"


def read_jpeg(path: Path) -> FileInfo:
    """Raises DataError when the file has no end mark after its picture data, ValueError when it is malformed."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found: dict[int, list[bytes]] = {}
        comments: dict[int, bytes] = {}
        for marker, begin, end in segments(content):
            value = content[begin + 4 : end]
            found.setdefault(marker, []).append(value)
            if marker == COM and value.startswith(COMMENT_NAME):
                comments[begin] = value.removeprefix(COMMENT_NAME)
            if end > len(content):
                raise truncated(path, "its header is not complete")
        # Within the data 0xFF is followed by 0 or a restart marker, so this is the end mark and no accident.
        if content.rfind(END, end) < 0:
            raise truncated(path, "it has no end mark (EOI)")
    return _info(path, found, comments)


def _info(path: Path, found: dict[int, list[bytes]], comments: dict[int, bytes]) -> FileInfo:
    frame = next((found[marker][0] for marker in FRAMES if marker in found), None)
    if frame is None or SOS not in found:
        raise ValueError("there is no picture in it")
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
        dpi=_dpi(found.get(APP0, [b""])[0]),
        file_bytes=path.stat().st_size,
        request=parse_request(request),
        parameters=_parameters(found.get(APP1, [])),
        file_sha256=checksum,
        file_sha256_at=min(comments) + DIGITS_IN_COMMENT if checksum else None,
    )


def _dpi(jfif: bytes) -> float | None:
    if not jfif.startswith(b"JFIF\0"):
        return None
    unit, density = struct.unpack(">BH", jfif[7:10])
    return {1: float(density), 2: round(density * 2.54, 2)}.get(unit)


def _parameters(segments_app1: list[bytes]) -> str | None:
    from PIL import Image

    data = next((data for data in segments_app1 if data.startswith(EXIF_NAME)), None)
    if data is None:
        return None
    exif = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a library prints nothing, and a damaged comment is no comment
        exif.load(data)
        comment = exif.get_ifd(0x8769).get(0x9286)
    if not isinstance(comment, bytes) or not comment.startswith(b"UNICODE\0"):
        return None
    return comment[8:].decode("utf-16-be", errors="replace")
