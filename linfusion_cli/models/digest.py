"""Which weights a picture was made with: the SHA-256 of every file of them. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from linfusion_cli.errors import DataError

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


def digested(files: Iterable[tuple[str, Path]]) -> list[WeightsFile]:
    """`files`, each with its use, hashed; a file of several uses once. Raises DataError for one that cannot be read."""
    uses: dict[Path, str] = {}
    for use, path in files:
        uses.setdefault(path, use)
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda path: digest(uses[path], path), uses))


def digest(use: str, path: Path) -> WeightsFile:
    """`path`, hashed."""
    try:
        with path.open("rb") as file:
            return WeightsFile(use, path, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).", "Check the disk.") from error
