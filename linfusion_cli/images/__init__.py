"""Pictures of any height, written row by row in bounded memory, and read back without decoding them."""

from linfusion_cli.core.atomic_file import AtomicFile
from linfusion_cli.images.metadata.metadata import (
    ImageInfo,
    a1111_parameters,
    remove_prompts,
    request_json,
    srgb_profile,
    without_prompt,
)
from linfusion_cli.images.metadata.xmp import xmp_packet
from linfusion_cli.images.read.file_info import FileInfo
from linfusion_cli.images.read.info import read_info
from linfusion_cli.images.verify.verify import verify_image
from linfusion_cli.images.write.preview_sink import PreviewSink, preview_size
from linfusion_cli.images.write.registry import FORMATS, bytes_needed, format_for, hold, open_sink
from linfusion_cli.images.write.sink import RowSink

__all__ = [
    "FORMATS",
    "FileInfo",
    "AtomicFile",
    "ImageInfo",
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
    "remove_prompts",
    "srgb_profile",
    "verify_image",
    "without_prompt",
    "xmp_packet",
]
