"""What a safetensors file says of itself: names, types and shapes of its tensors, and its notes. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from linfusion_cli.core.errors import DataError
from linfusion_cli.models.files.parts import pickled

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
COUNTERS = ("position_ids", "num_batches_tracked")  # the whole numbers that networks keep beside their weights
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip, and bare pickles


@dataclass(frozen=True)
class Header:
    """Shapes and types of the tensors in `file`, by name, and the texts that its writer put beside them."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    notes: Mapping[str, str]

    def check_types(self, prefix: str = "") -> None:
        """Raise DataError naming the first weights, of those whose name begins with `prefix`, that are no floats."""
        for name, kind in self.types.items():
            if name.startswith(prefix) and kind not in FLOATS and not name.endswith(COUNTERS):
                reason = f"{self.file} holds no weights in {name}, but numbers of the type {kind}."
                raise DataError(reason, "Use a file in fp32, fp16, bf16 or fp8.")


def read_header(file: Path) -> Header:
    """The header of `file`; raises DataError unless it is a safetensors file of the length that it says."""
    try:
        with file.open("rb") as start:
            if start.read(4).startswith(PICKLE_STARTS):
                raise pickled(str(file))
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            types = {name: part.get_dtype() for name, part in slices.items()}
            return Header(file, shapes, types, opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is not a whole safetensors file ({error}).", "Download it again.") from error
