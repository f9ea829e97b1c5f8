"""The state of a run, beside its output: saved so that a process killed at any moment leaves the last good state.

A folder `NAME.linfusion` holds `journal.json` and the files of tensors that this names, with their SHA-256. A new state
is a new file, synced, and then a new `journal.json`, renamed over the old one: that is the moment in which it counts.
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

from linfusion_cli.core.errors import CannotCreateOutput, WriteFailed
from linfusion_cli.core.fs import create_error, open_locked, sibling, sync_folder
from linfusion_cli.core.units import is_file, is_folder

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
MANIFEST, LOCK, TENSORS, UNFINISHED = "journal.json", "lock", ".safetensors", ".part"
OURS = re.compile(rf"\d+{re.escape(TENSORS)}|{re.escape(MANIFEST + UNFINISHED)}")
TENSOR_KEY = "tensor"  # {"tensor": NAME} stands in the manifest for a tensor of a part's file


class DamagedCheckpoint(Exception):
    """What is in a journal cannot be what was saved; the text says what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """What a journal says: JSON values about the run (`head`), and the parts of its state, which may hold tensors."""

    head: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Any]]


class CheckpointStore:
    """The journal of the run that makes `target`, in `folder`, or beside it. To change it one must have it `held`.

    Parts are dicts of JSON values, tensors, and lists and dicts of these.
    """

    def __init__(self, target: Path, folder: Path | None = None):
        self.target, self.folder = target, folder or sibling(target, "{}.linfusion")
        self.saved_bytes = 0
        self._files: dict[str, tuple[Mapping[str, Any], dict[str, Any]]] = {}  # name -> the part saved, its record

    def has_folder(self) -> bool:
        """Whether a run that was killed, or still goes on, has left anything."""
        return is_folder(self.folder)

    def exists(self) -> bool:
        """Whether a run has left a state."""
        return is_file(self.folder / MANIFEST)

    @contextmanager
    def held(self) -> Iterator[CheckpointStore]:
        """Have it, and with it the target, for oneself; a folder without a state goes at the end.

        Raises TryAgain where another run has it, CannotCreate where there can be none.
        """
        fd = self._locked()
        try:
            yield self
        finally:
            if not self.exists():
                self._sweep()
                with suppress(OSError):
                    (self.folder / LOCK).unlink()
                    self.folder.rmdir()
            os.close(fd)

    def read(self) -> Checkpoint | None:
        """What was saved last, None if nothing was; raises Damaged."""
        with _damage():
            if not self.exists():
                return None
            kept = self._manifest()
            if kept["sha256"] != _digest(kept["entry"]):
                raise DamagedCheckpoint(f"the checksum of {MANIFEST} is wrong")
            return Checkpoint(
                kept["entry"]["head"], {name: self._load(it) for name, it in kept["entry"]["parts"].items()}
            )

    def save(self, head: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Make this what `read` finds. A part that is the object saved last is not written again. Raises WriteFailed,
        and then the state before is still there."""
        with self._disk_errors():
            try:
                files = {name: self._kept(name, part) for name, part in parts.items()}
                entry = {"head": head, "parts": {name: record for name, (_, record) in files.items()}}
                self._write_manifest(json.dumps({"sha256": _digest(entry), "entry": entry}))
                self._files = files
            finally:
                self._sweep()

    def remove(self) -> None:
        """Forget the state; raises WriteFailed."""
        with self._disk_errors():
            (self.folder / MANIFEST).unlink(missing_ok=True)  # first: without it the rest is nothing
        self._sweep()

    def quarantine(self) -> Path:
        """Move it out of the way -> where it is now; raises WriteFailed."""
        with self._disk_errors():
            names = (sibling(self.folder, f"{{}}.aside-{number}") for number in count(1))
            aside = next(path for path in names if not os.path.lexists(path))
            aside.mkdir()
            for path in [path for path in self.folder.iterdir() if path.name != LOCK]:
                path.rename(aside / path.name)
            return aside

    def _kept(self, name: str, part: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """The part and where its tensors are, which are written now unless they are there."""
        if name in self._files and self._files[name][0] is part:
            return self._files[name]
        tensors: dict[str, Tensor] = {}
        values = _packed(part, "", tensors)
        return part, {"values": values} | self._write_tensors(tensors)

    def _write_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        from safetensors.torch import save

        taken = {path.name for path in self.folder.iterdir()}
        name = next(name for number in count(1) if (name := f"{number}{TENSORS}") not in taken)
        data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        _write_synced(self.folder / name, data)
        self.saved_bytes += len(data)
        return {"file": name, "sha256": hashlib.sha256(data).hexdigest()}

    def _load(self, record: Mapping[str, Any]) -> dict[str, Any]:
        from safetensors.torch import load

        data = (self.folder / record["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise DamagedCheckpoint(f"the checksum of {record['file']} is wrong")
        # Cloned: torch's results depend on how a tensor lies in memory.
        return _unpacked(record["values"], {name: tensor.clone() for name, tensor in load(data).items()})

    def _manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / MANIFEST).read_bytes())

    def _write_manifest(self, text: str) -> None:
        path = self.folder / MANIFEST
        unfinished = path.with_name(MANIFEST + UNFINISHED)
        _write_synced(unfinished, text.encode())
        unfinished.replace(path)
        sync_folder(self.folder)

    def _locked(self) -> int:
        """The descriptor of the lock. A run that ends may take the folder away meanwhile: then we make it again."""
        while True:
            try:
                self.folder.mkdir()
                sync_folder(self.folder.parent)
            except FileExistsError as error:
                if not is_folder(self.folder):
                    raise CannotCreateOutput(f"{self.folder} is no folder.", "Move it away.") from error
            except OSError as error:
                raise create_error(self.folder.parent, error) from error
            try:
                return open_locked(self.folder / LOCK, self.target)
            except CannotCreateOutput:
                if os.path.lexists(self.folder):
                    raise

    def _sweep(self) -> None:
        """Remove files of ours that the manifest does not name: of older states, and of a saving that failed."""
        with suppress(OSError, ValueError, LookupError, TypeError):  # one that cannot be read keeps them all
            named = {record["file"] for record in self._manifest()["entry"]["parts"].values()} if self.exists() else ()
            for path in list(self.folder.iterdir()):
                if path.name not in named and OURS.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"The state of the run could not be kept in {self.folder} ({error.strerror})."
            raise WriteFailed(message, "Free some space there, or check the disk.") from error


@contextmanager
def _damage() -> Iterator[None]:
    """Whatever reading bytes that are not what they should be may raise, as Damaged."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise DamagedCheckpoint(f"it cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise DamagedCheckpoint(f"it is not what was written ({type(error).__name__})") from error


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors` under their paths; raises TypeError for other things."""
    from torch import Tensor

    if isinstance(value, Tensor):
        tensors[name] = value
        return {TENSOR_KEY: name}
    if isinstance(value, Mapping):
        return {key: _packed(item, f"{name}.{key}".lstrip("."), tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which no journal keeps")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {TENSOR_KEY}:
            return tensors[value[TENSOR_KEY]]
        return {key: _unpacked(item, tensors) for key, item in value.items()}
    return [_unpacked(item, tensors) for item in value] if isinstance(value, list) else value


def _digest(entry: Any) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
