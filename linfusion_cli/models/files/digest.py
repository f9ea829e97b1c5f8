"""SHA-256 hashes of the weights files of a run. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from linfusion_cli.core.errors import DataError

FileIdentity = tuple[str, int, int, int]  # path, size in bytes, modification time in ns, inode

HASH_THREADS = 4  # files hashed in parallel: either the CPU or the disk can be the limit


@dataclass(frozen=True)
class WeightsFile:
    """A weights file of a run: its use ("unet", "lora" …), path, size and SHA-256."""

    use: str
    path: Path
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """The name in the image's metadata; it does not contain the folder."""
        return f"{self.use}/{self.path.name}"


def hash_files(
    files: Iterable[tuple[str, Path]], known: MutableMapping[FileIdentity, str] | None = None
) -> list[WeightsFile]:
    """Hash `files`, pairs of use and path; a file with several uses is hashed once.

    `known` has the SHA-256 of files that have been hashed before; new hashes are added to it. Raises DataError if a
    file cannot be read.
    """
    known = {} if known is None else known
    uses: dict[Path, str] = {}
    for use, path in files:
        uses.setdefault(path, use)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(lambda path: hash_file(uses[path], path, known), uses))


def hash_file(use: str, path: Path, known: MutableMapping[FileIdentity, str]) -> WeightsFile:
    """Hash `path`, unless its hash is in `known`."""
    try:
        identity = read_file_identity(path)
        if identity not in known:
            with path.open("rb") as file:
                known[identity] = hashlib.file_digest(file, "sha256").hexdigest()
        return WeightsFile(use, path, path.stat().st_size, known[identity])
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", "Check the disk.") from error


def read_file_identity(path: Path) -> FileIdentity:
    """Return path, size, modification time and inode; raise OSError if the file does not exist."""
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino
