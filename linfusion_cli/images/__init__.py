"""Read, verify and write image files of any height in bounded memory, with their metadata.

Sub-packages import only from those to the right: verify, read, write, then metadata and process.
"""

from linfusion_cli.core.atomic_file import AtomicFile
from linfusion_cli.images.metadata.metadata import (
    ImageInfo,
    build_srgb_profile,
    format_a1111_parameters,
    remove_prompt_keys,
    remove_prompt_metadata,
    serialize_request,
)
from linfusion_cli.images.metadata.xmp import build_xmp_packet
from linfusion_cli.images.read.file_info import FileInfo
from linfusion_cli.images.read.info import read_info
from linfusion_cli.images.verify.verify import verify_image
from linfusion_cli.images.write.preview_sink import PreviewSink, compute_preview_size
from linfusion_cli.images.write.registry import (
    FORMATS,
    compute_max_file_bytes,
    create_output_file,
    open_sink,
    resolve_format,
)
from linfusion_cli.images.write.sink import RowSink

__all__ = [
    "FORMATS",
    "AtomicFile",
    "FileInfo",
    "ImageInfo",
    "PreviewSink",
    "RowSink",
    "build_srgb_profile",
    "build_xmp_packet",
    "compute_max_file_bytes",
    "compute_preview_size",
    "create_output_file",
    "format_a1111_parameters",
    "open_sink",
    "read_info",
    "remove_prompt_keys",
    "remove_prompt_metadata",
    "resolve_format",
    "serialize_request",
    "verify_image",
]
