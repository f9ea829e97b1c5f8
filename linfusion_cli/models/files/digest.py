"""Which weights a picture was made with: the SHA-256 of every file of them. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from linfusion_cli.core.errors import DataError

Identity = tuple[str, int, int, int]

READERS = 4  # files at a time: hashing keeps a core busy, reading may keep a disk


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights that a run reads: what for ("unet", "lora" …), where it lies, its length, and its SHA-256."""

    use: str
    path: Path
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """What a picture's metadata call it: not where it lies on the machine it was made on."""
        return f"{self.use}/{self.path.name}"


def digested(
    files: Iterable[tuple[str, Path]], known: MutableMapping[Identity, str] | None = None
) -> list[WeightsFile]:
    """`files`, each with its use, hashed; a file of several uses once. Raises DataError for one that cannot be read.

    `known` are the SHA-256 of files that have been hashed before, and gets those that have not.
    """
    known = {} if known is None else known
    uses: dict[Path, str] = {}
    for use, path in files:
        uses.setdefault(path, use)
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda path: digest(uses[path], path, known), uses))


def digest(use: str, path: Path, known: MutableMapping[Identity, str]) -> WeightsFile:
    """`path`, hashed."""
    try:
        now = identity(path)
        if now not in known:
            with path.open("rb") as file:
                known[now] = hashlib.file_digest(file, "sha256").hexdigest()
        return WeightsFile(use, path, path.stat().st_size, known[now])
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", "Check the disk.") from error


def identity(path: Path) -> Identity:
    """What changes when a file does, as far as its folder tells; OSError where it is not there."""
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns, found.st_ino
