"""A folder into which lists of jobs are put: taken when nobody writes them any more, put aside when they are done.

Lists are known by their suffixes. Other files, notes or images, stay where they are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NoReturn

from linfusion_cli.batch.filenames import RESULTS
from linfusion_cli.batch.parsers.list_format import LIST_NAMES, has_list_suffix
from linfusion_cli.core.errors import CannotCreateOutput, InputNotFound
from linfusion_cli.core.events import Notice, Observer, ignore_event
from linfusion_cli.core.fs import rename_noreplace, unique_names
from linfusion_cli.core.units import is_folder

POLL_SEC = 1.0
UNFINISHED = (".part", ".tmp")  # as what is being copied here is called
DONE, FAILED = "done", "failed"
NOT_A_LIST = "{} is not a list of jobs, and stays where it is. " + LIST_NAMES

Stamp = tuple[int, int, int]


class Inbox:
    """The folder, and what its files looked like at the last look. `observer` is notified of other files."""

    def __init__(self, folder: Path, observer: Observer):
        """Makes the folders for what is done; raises InputMissing or CannotCreate."""
        if not is_folder(folder):
            raise InputNotFound(f"The folder {folder} does not exist.", "Create it first.")
        try:
            for name in (DONE, FAILED):
                (folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise CannotCreateOutput(f"{folder} refuses a folder ({error.strerror}).", "Name another one.") from error
        self._folder, self._observer = folder, observer
        self._seen: dict[Path, Stamp] = {}
        self._left: dict[Path, Stamp] = {}  # ignored until they change: other files, and lists that cannot be moved

    def ready(self) -> list[Path]:
        """The lists that have stood still since the last look, in the order of their names."""
        now = dict(self._looks())
        still = [path for path, stamp in now.items() if self._seen.get(path) == stamp != self._left.get(path)]
        self._seen = now
        return [path for path in sorted(still) if self._is_list(path)]

    def _is_list(self, path: Path) -> bool:
        """Whether `path` may be a list; if not, it is warned about, and left until it changes."""
        is_record = RESULTS.fullmatch(path.name) is not None  # our own, where --output-dir is this folder
        if has_list_suffix(path.name) and not is_record:
            return True
        self._left[path] = self._seen[path]
        if not is_record:
            self._observer(Notice(NOT_A_LIST.format(path)))
        return False

    def put_aside(self, path: Path, name: str) -> None:
        """Move a list that was seen into the folder `name`, unless it has changed meanwhile: then it is another one."""
        stamp = self._seen[path]
        if dict(self._looks()).get(path) != stamp:
            return
        try:
            free = self._folder / name / path.name
            next(filter(lambda name: rename_noreplace(path, name), chain([free], unique_names(free))))
        except OSError:
            self._left[path] = stamp

    def _looks(self) -> Iterator[tuple[Path, Stamp]]:
        try:
            found = list(os.scandir(self._folder))
        except OSError:  # a share that is away for a moment
            return
        for one in found:
            if one.name.startswith(".") or one.name.endswith(UNFINISHED):
                continue
            try:
                stat = one.stat()
                if one.is_file():
                    yield Path(one.path), (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            except OSError:  # gone already
                continue


def watch(
    folder: Path,
    carried_out: Callable[[Path], bool],
    pause: Callable[[float], None] = time.sleep,
    observer: Observer = ignore_event,
) -> NoReturn:
    """Hand `carried_out` every list that appears, which says whether all went well; ends by what stops the process.

    `observer` is notified once of each file that is not a list, and again if it changes.
    """
    inbox = Inbox(folder, observer)
    while True:
        for path in inbox.ready():
            inbox.put_aside(path, DONE if carried_out(path) else FAILED)
        pause(POLL_SEC)
