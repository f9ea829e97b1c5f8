"""Finished latents as a file, which `linfusion decode` makes a picture of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linfusion_cli.checkpoint.store import CheckpointStore, DamagedCheckpoint
from linfusion_cli.core.errors import DataError, InputNotFound, LinfusionError, UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.units import is_file, is_folder, parse_size
from linfusion_cli.images import AtomicFile
from linfusion_cli.models.files.header import Header, read_header
from linfusion_cli.run.inputs.provenance import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

LATENTS, NOTE = "latents", "linfusion"  # one note: several are written in any order


@dataclass(frozen=True)
class SavedLatents:
    """Finished latents [1, C, h, w], the request and weights that made them, and the size of their picture in px."""

    path: Path
    made_with: Mapping[str, Any]
    phase_size: Size
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_latents(file: AtomicFile, latents: Tensor, phase_size: Size, made_with: Mapping[str, Any]) -> None:
    """`latents` [1, C, h, w] of a picture of `phase_size` px, with the request and the weights that made them."""
    from safetensors.torch import save

    note = json.dumps({"phase_size": str(phase_size), "made_with": made_with})
    file.write(save({LATENTS: latents.contiguous()}, {NOTE: note}))
    file.commit()


def open_latents(path: Path) -> SavedLatents:
    """What the file, or journal, at `path` holds; raises InputMissing, or DataError for what holds none."""
    if is_folder(path):
        return open_checkpoint_latents(path)
    if not is_file(path):
        raise InputNotFound(f"{path} does not exist.")
    header = read_header(path)
    try:
        note = json.loads(header.notes[NOTE])
        size, shape = parse_size(note["phase_size"]), checked_shape(header)
        return SavedLatents(path, check_metadata(note["made_with"]), size, shape, partial(read_latents, path))
    except (LookupError, ValueError, TypeError, UsageError) as error:
        raise DataError(f"{path} holds no latents of a finished picture.", "Make one with --keep-latents.") from error


def read_latents(path: Path) -> Tensor:
    """The latents in a file, in fp32."""
    from safetensors.torch import load_file

    return load_file(path)[LATENTS].clone()


def open_checkpoint_latents(folder: Path) -> SavedLatents:
    """The finished latents that a run has left in its journal; raises DataError where it has not."""
    try:
        entry = CheckpointStore(folder, folder).read()
    except DamagedCheckpoint as damage:
        raise DataError(f"{folder} is no whole journal ({damage}).", "Run its command again.") from damage
    reached, last = ({}, {}) if entry is None else (entry.parts["reached"], entry.head["last"])
    if not reached.get("is_done") or entry.parts["begun"]["phase"] != last["phase"]:
        raise DataError(f"{folder} holds no finished latents.", "Run its command again: it goes on from there.")
    latents, head = reached["latents"], entry.head
    made_with = head["request"] | {"weights": head["weights"], DTYPES: head.get(DTYPES, [])}
    return SavedLatents(folder, made_with, parse_size(last["size"]), tuple(latents.shape), lambda: latents)


def checked_shape(header: Header) -> tuple[int, ...]:
    """The shape of the latents; raises ValueError where they are none."""
    shape = header.shapes[LATENTS]
    if len(shape) != 4 or shape[0] != 1 or header.types[LATENTS] != "F32":
        raise ValueError("not [1, C, h, w] in fp32")
    return shape


def check_metadata(made_with: Any) -> dict[str, Any]:
    """The request, with weights and dtypes as `jobs.weights.made_with` writes them; raises ValueError or TypeError.

    Older latents have no dtypes.
    """
    made_with = {DTYPES: []} | made_with
    weights, dtypes = made_with["weights"], made_with[DTYPES]
    if not isinstance(weights, list) or not all("/" in file["file"] and str(file["sha256"]) for file in weights):
        raise ValueError("no weights")
    if not isinstance(dtypes, list) or not all(isinstance(entry, dict) for entry in dtypes):
        raise ValueError("no dtypes")
    return made_with


def made_with(path: Path) -> Mapping[str, Any] | None:
    """The request and weights that the latents at `path` were made with; None where there are none."""
    try:
        return open_latents(path).made_with
    except LinfusionError:
        return None
