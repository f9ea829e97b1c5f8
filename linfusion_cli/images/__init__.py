"""Pictures of any height, written row by row in bounded memory, and read back without decoding them."""

from linfusion_cli.core.atomic_file import PendingFile
from linfusion_cli.images.fileinfo import FileInfo
from linfusion_cli.images.formats import FORMATS, bytes_needed, format_for, hold, open_sink
from linfusion_cli.images.metadata import (
    PictureInfo,
    a1111_parameters,
    request_json,
    scrubbed,
    srgb_profile,
    without_prompt,
)
from linfusion_cli.images.preview import PreviewSink, preview_size
from linfusion_cli.images.read import read_info
from linfusion_cli.images.sink import RowSink
from linfusion_cli.images.verify import verify
from linfusion_cli.images.xmp import xmp_packet

__all__ = [
    "FORMATS",
    "FileInfo",
    "PendingFile",
    "PictureInfo",
    "PreviewSink",
    "RowSink",
    "a1111_parameters",
    "bytes_needed",
    "format_for",
    "hold",
    "open_sink",
    "preview_size",
    "read_info",
    "request_json",
    "scrubbed",
    "srgb_profile",
    "verify",
    "without_prompt",
    "xmp_packet",
]
