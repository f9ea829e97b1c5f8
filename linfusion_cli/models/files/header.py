"""Headers of safetensors files: names, dtypes and shapes of the tensors, and the metadata. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from linfusion_cli.core.errors import DataError
from linfusion_cli.models.files.layout import build_pickle_error

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
INTEGER_BUFFERS = ("position_ids", "num_batches_tracked")  # integer tensors that are no weights
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip, and bare pickles


@dataclass(frozen=True)
class Header:
    """Shapes and dtypes of the tensors in `file` by name, and the file's metadata."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]

    def check_dtypes(self, prefix: str = "") -> None:
        """Raise DataError for the first tensor with this name prefix that has no floating-point dtype."""
        for name, kind in self.dtypes.items():
            if name.startswith(prefix) and kind not in FLOAT_DTYPES and not name.endswith(INTEGER_BUFFERS):
                reason = f"{self.file}: the tensor {name} has the type {kind}, which is not a floating-point type."
                raise DataError(reason, "Use a file in fp32, fp16, bf16 or fp8.")


def read_header(file: Path) -> Header:
    """Read the header of `file`; raise DataError unless it is a complete safetensors file."""
    try:
        with file.open("rb") as start:
            if start.read(4).startswith(PICKLE_MAGIC):
                raise build_pickle_error(str(file))
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not iterable
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            types = {name: part.get_dtype() for name, part in slices.items()}
            return Header(file, shapes, types, opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is not a complete safetensors file ({error}).", "Download it again.") from error
