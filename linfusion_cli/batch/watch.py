"""Watch a folder for job lists: process each one when it is completely written, then move it to a subfolder.

Lists are recognised by their suffix. All other files, such as notes or images, stay in place.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NoReturn

from linfusion_cli.batch.filenames import RESULTS_NAME
from linfusion_cli.batch.parsers.list_format import SUFFIX_HINT, has_list_suffix
from linfusion_cli.core.errors import CannotCreateOutput, InputNotFound
from linfusion_cli.core.events import Notice, Observer, ignore_event
from linfusion_cli.core.fs import is_folder, rename_noreplace, unique_names

POLL_SEC = 1.0
TEMP_SUFFIXES = (".part", ".tmp")  # of files that are being copied
DONE, FAILED = "done", "failed"
NOT_A_LIST = "{} is not a job list and stays in place. " + SUFFIX_HINT

Stamp = tuple[int, int, int]  # size, modification time and inode


class Inbox:
    """The watched folder, and the state of its files at the last scan; `observer` is notified of other files."""

    def __init__(self, folder: Path, observer: Observer):
        """Create the subfolders for processed lists; raise InputNotFound or CannotCreateOutput."""
        if not is_folder(folder):
            raise InputNotFound(f"The folder {folder} does not exist.", "Create it first.")
        try:
            for name in (DONE, FAILED):
                (folder / name).mkdir(exist_ok=True)
        except OSError as error:
            reason = f"Subfolders of {folder} cannot be created ({error.strerror})."
            raise CannotCreateOutput(reason, "Choose another folder.") from error
        self._folder, self._observer = folder, observer
        self._seen: dict[Path, Stamp] = {}
        self._ignored: dict[Path, Stamp] = {}  # until they change: other files, and lists that cannot be moved

    def find_ready(self) -> list[Path]:
        """Return the lists that have not changed since the last scan, sorted by name."""
        now = dict(self._scan())
        unchanged = [path for path, stamp in now.items() if self._seen.get(path) == stamp != self._ignored.get(path)]
        self._seen = now
        return [path for path in sorted(unchanged) if self._check_list(path)]

    def _check_list(self, path: Path) -> bool:
        """Return True if `path` can be a list; otherwise warn about it, and ignore it until it changes."""
        is_results = RESULTS_NAME.fullmatch(path.name) is not None  # of a batch with this folder as --output-dir
        if has_list_suffix(path.name) and not is_results:
            return True
        self._ignored[path] = self._seen[path]
        if not is_results:
            self._observer(Notice(NOT_A_LIST.format(path)))
        return False

    def move(self, path: Path, name: str) -> None:
        """Move a processed list to the subfolder `name`, unless it has changed since: then it is a new list."""
        stamp = self._seen[path]
        if dict(self._scan()).get(path) != stamp:
            return
        try:
            target = self._folder / name / path.name
            next(filter(lambda name: rename_noreplace(path, name), chain([target], unique_names(target))))
        except OSError:
            self._ignored[path] = stamp

    def _scan(self) -> Iterator[tuple[Path, Stamp]]:
        try:
            entries = list(os.scandir(self._folder))
        except OSError:  # a network share that is temporarily unavailable
            return
        for entry in entries:
            if entry.name.startswith(".") or entry.name.endswith(TEMP_SUFFIXES):
                continue
            try:
                stat = entry.stat()
                if entry.is_file():
                    yield Path(entry.path), (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            except OSError:  # deleted since
                continue


def watch(
    folder: Path,
    process: Callable[[Path], bool],
    pause: Callable[[float], None] = time.sleep,
    observer: Observer = ignore_event,
) -> NoReturn:
    """Call `process` with every list that appears, until a signal stops the process.

    process: run the list and return True if all its jobs succeeded.
    observer: is notified once of each file that is not a list, and again if that file changes.
    """
    inbox = Inbox(folder, observer)
    while True:
        for path in inbox.find_ready():
            inbox.move(path, DONE if process(path) else FAILED)
        pause(POLL_SEC)
