"""Finished latents as a file, the input of `linfusion decode`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linfusion_cli.checkpoint.store import Checkpoint, CheckpointStore, DamagedCheckpoint, IncompatibleCheckpoint
from linfusion_cli.core.errors import DataError, InputNotFound, LinfusionError, UsageError
from linfusion_cli.core.fs import is_file, is_folder
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.units import parse_size
from linfusion_cli.images import AtomicFile
from linfusion_cli.models.files.header import Header, read_header
from linfusion_cli.run.checkpoint.known_keys import KNOWN_KEYS
from linfusion_cli.run.inputs.provenance import DTYPES_KEY

if TYPE_CHECKING:
    from torch import Tensor

LATENTS_KEY = "latents"  # the name of the tensor
NOTE_KEY = "linfusion"  # a single metadata entry: safetensors writes several in arbitrary order


@dataclass(frozen=True)
class SavedLatents:
    """Finished latents in a file or checkpoint.

    metadata: the request, the weights and the dtypes that made them.
    phase_size: the size of their image in px.
    shape: [1, C, h, w].
    read: load the latents, in fp32.
    """

    path: Path
    metadata: Mapping[str, Any]
    phase_size: Size
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_latents(file: AtomicFile, latents: Tensor, phase_size: Size, metadata: Mapping[str, Any]) -> None:
    """Write `latents` [1, C, h, w] of an image of `phase_size` px with their metadata, and commit the file."""
    from safetensors.torch import save

    note = json.dumps({"phase_size": str(phase_size), "made_with": metadata})
    file.write(save({LATENTS_KEY: latents.contiguous()}, {NOTE_KEY: note}))
    file.commit()


def open_latents(path: Path) -> SavedLatents:
    """Return the latents in a file or in a checkpoint folder.

    Raises InputNotFound, DataError if `path` holds no finished latents, UsageError for an incompatible checkpoint.
    """
    if is_folder(path):
        return open_checkpoint_latents(path)
    if not is_file(path):
        raise InputNotFound(f"{path} does not exist.")
    header = read_header(path)
    try:
        note = json.loads(header.metadata[NOTE_KEY])
        size, shape = parse_size(note["phase_size"]), check_shape(header)
        return SavedLatents(path, check_metadata(note["made_with"]), size, shape, partial(read_latents, path))
    except (LookupError, ValueError, TypeError, UsageError) as error:
        raise DataError(f"{path} holds no latents of a finished image.", "Make one with --keep-latents.") from error


def read_latents(path: Path) -> Tensor:
    """Load the latents in a file, in fp32."""
    from safetensors.torch import load_file

    return load_file(path)[LATENTS_KEY].clone()


def open_checkpoint_latents(folder: Path) -> SavedLatents:
    """Return the finished latents in a checkpoint.

    Raises DataError if the checkpoint is unfinished or damaged, UsageError if it is incompatible.
    """
    try:
        checkpoint = CheckpointStore(folder, folder, KNOWN_KEYS).read()
    except DamagedCheckpoint as damage:
        raise DataError(f"The checkpoint {folder} is damaged ({damage}).", "Repeat the run that wrote it.") from damage
    except IncompatibleCheckpoint as error:
        error.hint = "Decode it with the version that wrote it."
        raise
    if checkpoint is None or not is_last_phase_done(checkpoint):
        raise DataError(f"{folder} holds no finished latents.", "Repeat the command of its run to resume it.")
    latents, metadata = checkpoint.state["run_state"]["latents"], checkpoint.metadata
    made_with = metadata["request"] | {"weights": metadata["weights"], DTYPES_KEY: metadata.get(DTYPES_KEY, [])}
    size = parse_size(metadata["last_phase"]["size"])
    return SavedLatents(folder, made_with, size, tuple(latents.shape), lambda: latents)


def is_last_phase_done(checkpoint: Checkpoint) -> bool:
    """Return True if the state is the end of the last phase."""
    state, last = checkpoint.state, checkpoint.metadata["last_phase"]
    return state["run_state"]["is_done"] and state["phase_state"]["phase"] == last["phase"]


def check_shape(header: Header) -> tuple[int, ...]:
    """Return the shape of the latents; raise ValueError if it is not [1, C, h, w] in fp32."""
    shape = header.shapes[LATENTS_KEY]
    if len(shape) != 4 or shape[0] != 1 or header.dtypes[LATENTS_KEY] != "F32":
        raise ValueError("not [1, C, h, w] in fp32")
    return shape


def check_metadata(metadata: Any) -> dict[str, Any]:
    """Return `metadata` after checking its weights and dtypes; raise ValueError or TypeError if they are invalid.

    Latents of older versions have no dtypes.
    """
    metadata = {DTYPES_KEY: []} | metadata
    weights, dtypes = metadata["weights"], metadata[DTYPES_KEY]
    if not isinstance(weights, list) or not all("/" in file["file"] and str(file["sha256"]) for file in weights):
        raise ValueError("no weights")
    if not isinstance(dtypes, list) or not all(isinstance(entry, dict) for entry in dtypes):
        raise ValueError("no dtypes")
    return metadata


def read_metadata(path: Path) -> Mapping[str, Any] | None:
    """Return the metadata of the latents at `path`; None if there are no valid latents."""
    try:
        return open_latents(path).metadata
    except LinfusionError:
        return None
