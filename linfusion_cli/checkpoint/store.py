"""Store the state of a run next to its output. A process killed at any moment leaves the last good state.

The folder `NAME.linfusion` holds `checkpoint.json` and the safetensors files that it names, with their SHA-256. Saving
writes and syncs new tensor files, writes a new manifest, and renames it over the old one: the rename commits the state.

The manifest is `{"sha256": S, "entry": {"schema", "numerics", "linfusion", "metadata", "state"}}`, with S the digest of
`entry`. Every schema keeps this envelope: each version has to recognise the checkpoints of the others.

A checkpoint can be read if its schema and numerics are those of this program. The version `linfusion` is information.
Keys that only a later version knows are preserved: `save` writes what `read` has put aside.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linfusion_cli import __version__
from linfusion_cli.checkpoint.extra_keys import Known, KnownKeys, add_keys, split_keys
from linfusion_cli.checkpoint.versions import NUMERICS, SCHEMA
from linfusion_cli.core.errors import CannotCreateOutput, UsageError, WriteFailed
from linfusion_cli.core.fs import build_sibling_path, create_error, is_file, is_folder, open_locked, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST, LOCK_FILE, TENSOR_SUFFIX, TEMP_SUFFIX = "checkpoint.json", "lock", ".safetensors", ".part"
OLD_MANIFEST = "journal.json"  # of schema 1
OWN_FILES = re.compile(
    rf"\d+{re.escape(TENSOR_SUFFIX)}|(?:{re.escape(MANIFEST)}|{re.escape(OLD_MANIFEST)}){re.escape(TEMP_SUFFIX)}"
)
ENTRY_KEYS = dict.fromkeys(("schema", "numerics", "linfusion", "metadata", "state"))
TENSOR_KEY = "tensor"  # {"tensor": NAME} in the manifest refers to a tensor in the section's file


class DamagedCheckpoint(Exception):
    """The content of a checkpoint is not the saved content; the message describes the damage."""


class IncompatibleCheckpoint(UsageError):
    """The checkpoint has another schema, or its values were computed with other numerics."""

    def __init__(self, folder: Path, details: str):
        hint = "Finish it with the version that wrote it, or add --fresh to start over."
        super().__init__(f"{folder} holds a checkpoint {details}.", hint)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: JSON values that describe the run, and its state by section.

    A section is a dict of JSON values, tensors, and lists and dicts of these. `linfusion` is the version that wrote it.
    """

    metadata: Mapping[str, Any]
    state: Mapping[str, Mapping[str, Any]]
    linfusion: str = __version__


class CheckpointStore:
    """The checkpoint of the run that writes `target`, in `folder` or by default next to `target`.

    Hold `lock()` while changing it. `known` has the keys of the metadata and those of each section of the state, by
    its name, that the caller knows; default: all.
    """

    def __init__(self, target: Path, folder: Path | None = None, known: Known | None = None):
        self.target, self.folder = target, folder or build_sibling_path(target, "{}.linfusion")
        self.saved_bytes = 0
        self._known_metadata, self._known_sections = known or (None, None)
        self._forget_extra()
        # The sections as saved last: name -> the section and its record in the manifest.
        self._saved: dict[str, tuple[Mapping[str, Any], dict[str, Any]]] = {}

    def has_folder(self) -> bool:
        """Return True if the folder exists: a run is active or was killed."""
        return is_folder(self.folder)

    def exists(self) -> bool:
        """Return True if the folder holds a checkpoint, in any format."""
        return is_file(self.folder / MANIFEST) or is_file(self.folder / OLD_MANIFEST)

    @contextmanager
    def lock(self) -> Iterator[CheckpointStore]:
        """Hold the lock of the folder; on exit, remove the folder if it holds no checkpoint.

        Raises TemporaryFailure if another run holds the lock, CannotCreateOutput if the folder cannot be created.
        """
        fd = self._open_lock()
        try:
            yield self
        finally:
            if not self.exists():
                self.prune()
                with suppress(OSError):
                    (self.folder / LOCK_FILE).unlink()
                    self.folder.rmdir()
            os.close(fd)

    def read(self) -> Checkpoint | None:
        """Return the last saved checkpoint with its known keys; None if the folder is empty or missing.

        Raises DamagedCheckpoint, or IncompatibleCheckpoint for one of another schema or other numerics.
        """
        with _catch_read_errors():
            if is_file(self.folder / OLD_MANIFEST):
                raise self._build_schema_error(1)
            if not self.exists():
                return None
            entry = self._read_entry()
            self._check_numbers(entry)
            return self._load(entry)

    def save(self, metadata: Mapping[str, Any], state: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the checkpoint.

        A section that is the same object as in the last save is not written again. Raises WriteFailed; the previous
        checkpoint is then intact.
        """
        with self._catch_write_errors():
            try:
                sections = {name: self._save_section(name, section) for name, section in state.items()}
                records = {name: record for name, (_, record) in sections.items()}
                numbers = {"schema": SCHEMA, "numerics": NUMERICS, "linfusion": __version__}
                entry = numbers | {"metadata": metadata, "state": records}
                entry = add_keys(entry, self._extra, self._entry_keys)
                self._write_manifest(json.dumps({"sha256": _compute_digest(entry), "entry": entry}))
                self._saved = sections
            finally:
                self.prune()

    def remove(self) -> None:
        """Delete the checkpoint, in any format; raises WriteFailed."""
        self._forget_extra()
        with self._catch_write_errors():
            for name in (MANIFEST, OLD_MANIFEST):  # first: without a manifest the other files have no meaning
                (self.folder / name).unlink(missing_ok=True)
        self.prune()

    def quarantine(self) -> Path:
        """Move the checkpoint to a new folder and return that folder; raises WriteFailed."""
        with self._catch_write_errors():
            names = (build_sibling_path(self.folder, f"{{}}.aside-{number}") for number in count(1))
            folder = next(path for path in names if not os.path.lexists(path))
            folder.mkdir()
            for path in [path for path in self.folder.iterdir() if path.name != LOCK_FILE]:
                path.rename(folder / path.name)
            self._forget_extra()
            return folder

    def prune(self) -> None:
        """Delete own files that the manifest does not name: of earlier states, and of failed saves.

        Delete nothing if the manifest cannot be read or has another schema.
        """
        with suppress(OSError, ValueError, LookupError, TypeError):
            named = self._list_tensor_files()
            for path in list(self.folder.iterdir()):
                if path.name not in named and OWN_FILES.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _forget_extra(self) -> None:
        # The keys that `read` has put aside: those of the manifest, with unknown sections as records, and by section.
        self._extra: Mapping[str, Any] = {}
        self._extra_in_sections: dict[str, Mapping[str, Any]] = {}

    def _check_numbers(self, entry: Mapping[str, Any]) -> None:
        """Raise IncompatibleCheckpoint if the schema or the numerics are not those of this program."""
        if entry["schema"] != SCHEMA:
            raise self._build_schema_error(entry["schema"])
        if entry["numerics"] != NUMERICS:
            numbers = f"(numerics {entry['numerics']}; this version has numerics {NUMERICS})"
            details = f"of linfusion {entry['linfusion']}, which computes other values {numbers}"
            raise IncompatibleCheckpoint(self.folder, details)

    def _load(self, entry: Mapping[str, Any]) -> Checkpoint:
        """Return the checkpoint with its known keys. Put the others aside; unknown sections are not loaded."""
        entry, self._extra = split_keys(entry, self._entry_keys)
        loaded = {name: self._load_section(record) for name, record in entry["state"].items()}
        parts = {name: split_keys(section, self._find_section_keys(name)) for name, section in loaded.items()}
        self._extra_in_sections = {name: extra for name, (_, extra) in parts.items()}
        sections = {name: section for name, (section, _) in parts.items()}
        return Checkpoint(entry["metadata"], sections, entry["linfusion"])

    @property
    def _entry_keys(self) -> KnownKeys:
        """The known keys of the entry in the manifest, where sections are records."""
        sections = None if self._known_sections is None else dict.fromkeys(self._known_sections)
        return ENTRY_KEYS | {"metadata": self._known_metadata, "state": sections}

    def _find_section_keys(self, name: str) -> KnownKeys | None:
        return None if self._known_sections is None else self._known_sections.get(name)

    def _list_tensor_files(self) -> set[str]:
        """Return the names of the tensor files in the manifest; raise an error if it cannot be read."""
        if not self.exists():
            return set()
        entry = json.loads((self.folder / MANIFEST).read_bytes())["entry"]
        if entry["schema"] != SCHEMA or is_file(self.folder / OLD_MANIFEST):
            raise ValueError("another schema")
        return {record["file"] for record in entry["state"].values()}

    def _save_section(self, name: str, section: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Return the section and its record, after writing its tensors unless the last save did."""
        if name in self._saved and self._saved[name][0] is section:
            return self._saved[name]
        tensors: dict[str, Tensor] = {}
        complete = add_keys(section, self._extra_in_sections.get(name, {}), self._find_section_keys(name))
        values = _pack(complete, "", tensors)
        return section, {"values": values} | self._write_tensors(tensors)

    def _write_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        from safetensors.torch import save

        existing = {path.name for path in self.folder.iterdir()}
        name = next(name for number in count(1) if (name := f"{number}{TENSOR_SUFFIX}") not in existing)
        data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        _write_synced(self.folder / name, data)
        self.saved_bytes += len(data)
        return {"file": name, "sha256": hashlib.sha256(data).hexdigest()}

    def _load_section(self, record: Mapping[str, Any]) -> dict[str, Any]:
        from safetensors.torch import load

        data = (self.folder / record["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise DamagedCheckpoint(f"the checksum of {record['file']} is wrong")
        # Cloned: the results of torch depend on the alignment of a tensor in memory.
        return _unpack(record["values"], {name: tensor.clone() for name, tensor in load(data).items()})

    def _read_entry(self) -> dict[str, Any]:
        """Return the entry of the manifest after checking its digest."""
        manifest = json.loads((self.folder / MANIFEST).read_bytes())
        if manifest["sha256"] != _compute_digest(manifest["entry"]):
            raise DamagedCheckpoint(f"the checksum of {MANIFEST} is wrong")
        return manifest["entry"]

    def _write_manifest(self, text: str) -> None:
        path = self.folder / MANIFEST
        temporary = path.with_name(MANIFEST + TEMP_SUFFIX)
        _write_synced(temporary, text.encode())
        temporary.replace(path)
        sync_folder(self.folder)

    def _build_schema_error(self, schema: int) -> IncompatibleCheckpoint:
        age = "an older" if schema < SCHEMA else "a newer"
        details = f"of {age} format (schema {schema}; this version reads schema {SCHEMA})"
        return IncompatibleCheckpoint(self.folder, details)

    def _open_lock(self) -> int:
        """Return the descriptor of the lock. Retry if a run that ends removes the folder in between."""
        while True:
            try:
                self.folder.mkdir()
                sync_folder(self.folder.parent)
            except FileExistsError as error:
                if not is_folder(self.folder):
                    raise CannotCreateOutput(f"{self.folder} is not a folder.", "Move it away.") from error
            except OSError as error:
                raise create_error(self.folder.parent, error) from error
            try:
                return open_locked(self.folder / LOCK_FILE, self.target)
            except CannotCreateOutput:
                if os.path.lexists(self.folder):
                    raise

    @contextmanager
    def _catch_write_errors(self) -> Iterator[None]:
        """Turn OSError into WriteFailed."""
        try:
            yield
        except OSError as error:
            message = f"The checkpoint in {self.folder} could not be written ({error.strerror})."
            raise WriteFailed(message, "Free some space there, or check the disk.") from error


@contextmanager
def _catch_read_errors() -> Iterator[None]:
    """Turn every error that reading damaged bytes can raise into DamagedCheckpoint."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise DamagedCheckpoint(f"it cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise DamagedCheckpoint(f"its content is invalid ({type(error).__name__})") from error


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON values; add its tensors to `tensors` by their path. Raises TypeError for other types."""
    from torch import Tensor

    if isinstance(value, Tensor):
        tensors[name] = value
        return {TENSOR_KEY: name}
    if isinstance(value, Mapping):
        return {key: _pack(item, f"{name}.{key}".lstrip("."), tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {name}: {type(value).__name__}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return `value` with the tensors that it refers to."""
    if isinstance(value, Mapping):
        if value.keys() == {TENSOR_KEY}:
            return tensors[value[TENSOR_KEY]]
        return {key: _unpack(item, tensors) for key, item in value.items()}
    return [_unpack(item, tensors) for item in value] if isinstance(value, list) else value


def _compute_digest(entry: Any) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        remaining = memoryview(data)
        while remaining:
            remaining = remaining[file.write(remaining) :]
        os.fsync(file.fileno())
