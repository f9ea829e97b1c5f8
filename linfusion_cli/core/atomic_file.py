"""A file that gets its name only when it is complete."""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from linfusion_cli.core.errors import CannotCreateOutput, WriteFailed
from linfusion_cli.core.fs import PART, is_same_file, open_locked, rename_noreplace, sibling, sync_folder, unique_names
from linfusion_cli.core.units import format_bytes

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class AtomicFile:
    """A temporary file `.NAME.part` beside its target, locked, and renamed to the target by `commit`.

    Opening checks everything that can be checked before hours of work: raises CannotCreate when the target exists
    (without `overwrite`), is no regular file, or its folder is missing or refuses, and TryAgain when another process
    writes the same target. A temporary file left by a killed process is taken over. When the target is a symlink, the
    file it points to is replaced and the link stays. `bytes_needed` is only used to say how much space was missing.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool = False, bytes_needed: int = 0):
        self.target = resolve_target(Path(path))
        self.overwrite = overwrite
        self._bytes_needed = bytes_needed
        self._check_target()
        self.path = sibling(self.target, PART)
        self._fd = _open_empty(self.path, self.target)
        self._open = True
        self.position = 0
        try:
            self._check_target()  # once more: the holder of the lock may have finished a moment ago
        except BaseException:
            self.abort()
            raise

    def write(self, data: bytes) -> None:
        """Append; raises WriteFailed."""
        self._write(data, self.position)
        self.position += len(data)

    def write_at(self, offset: int, data: bytes) -> None:
        """Replace bytes that were written before; raises WriteFailed."""
        self._write(data, offset)

    def clear(self) -> None:
        """Forget what was written; raises WriteFailed."""
        with self._disk_errors():
            os.ftruncate(self._fd, 0)
        self.position = 0

    def commit(self) -> None:
        """Sync, rename to the target, sync the folder. Raises WriteFailed, or CannotCreate if the target appeared."""
        with self._disk_errors():
            os.fsync(self._fd)
        self._publish()
        with self._disk_errors():
            sync_folder(self.target.parent)
            self._close()

    def abort(self) -> None:
        """Remove the temporary file; harmless after `commit`, never raises."""
        if not self._open:
            return
        with suppress(OSError):
            if is_same_file(self._fd, self.path):
                self.path.unlink()
        with suppress(OSError):
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.abort()

    def _write(self, data: bytes, offset: int) -> None:
        view = memoryview(data).cast("B")
        with self._disk_errors():
            while view:
                done = os.pwrite(self._fd, view, offset)
                view, offset = view[done:], offset + done

    def _close(self) -> None:
        self._open = False
        os.close(self._fd)

    def _check_target(self) -> None:
        try:
            mode = self.target.lstat().st_mode
        except FileNotFoundError:
            return
        except OSError as error:
            raise CannotCreateOutput(f"{self.target} cannot be created: {error.strerror}.") from error
        if stat.S_ISDIR(mode):
            raise CannotCreateOutput(f"{self.target} is a folder.", "Name a file in it.")
        if not stat.S_ISREG(mode):  # renaming over /dev/null would remove it
            raise CannotCreateOutput(f"{self.target} is not a regular file.", "Name a file that can be replaced.")
        if not self.overwrite:
            raise CannotCreateOutput(f"{self.target} exists.", "Add --overwrite to replace it, or name another file.")

    def _publish(self) -> None:
        """Give the file its final name. If somebody else took that meanwhile, the work is kept beside it."""
        with self._disk_errors():
            if self.overwrite:
                self._check_target()
                self.path.replace(self.target)
            elif not rename_noreplace(self.path, self.target):
                spare = next(name for name in unique_names(self.target) if rename_noreplace(self.path, name))
                raise CannotCreateOutput(
                    f"{self.target} appeared while it was being made.", f"The finished file is {spare}."
                )

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteFailed(*self._explain(error)) from error

    def _explain(self, error: OSError) -> tuple[str, str]:
        folder = self.target.parent
        if error.errno == errno.EFBIG:
            return f"{self.target} is larger than files may be in {folder}.", "Raise ulimit -f."
        if error.errno not in NO_SPACE:
            return f"Writing {self.target} failed: {error.strerror}.", "Check the disk."
        missing = max(self._bytes_needed - self.position, 0)
        more = f"up to {format_bytes(missing)} more are needed" if missing else "more is needed"
        reason = "the disk quota is used up" if error.errno == errno.EDQUOT else f"{_free(folder)} free"
        message = f"No space left in {folder} for {self.target.name}: {reason}, {format_bytes(self.position)} written"
        return f"{message}, {more}.", "Free some space."


def resolve_target(path: Path) -> Path:
    """Where a file called `path` will lie: a link's target; raises CannotCreate for a loop of links."""
    try:
        return path.resolve() if path.is_symlink() else path.absolute()
    except (OSError, RuntimeError) as error:  # a loop of symlinks
        raise CannotCreateOutput(f"{path} cannot be created: {getattr(error, 'strerror', error)}.") from error


def _open_empty(path: Path, target: Path) -> int:
    """The descriptor of `path`, locked and empty. A run that was killed between linking and unlinking has left a
    finished picture under that name: it loses the name, and we try again."""
    while True:
        fd = open_locked(path, target)
        if os.fstat(fd).st_nlink == 1:
            os.ftruncate(fd, 0)
            return fd
        path.unlink()
        os.close(fd)


def _free(folder: Path) -> str:
    try:
        return format_bytes(shutil.disk_usage(folder).free)
    except OSError:
        return "nothing"
