"""Write an output to a temporary file and rename it when it is complete."""

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
from linfusion_cli.core.fs import (
    PART_PATTERN,
    build_sibling_path,
    is_same_file,
    open_locked,
    rename_noreplace,
    sync_folder,
    unique_names,
)
from linfusion_cli.core.units import format_bytes

NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class AtomicFile:
    """A locked temporary file `.NAME.part` in the folder of its target, renamed to the target by `commit`.

    The constructor checks as much as possible before hours of work. It raises CannotCreateOutput if the target exists
    (without `overwrite`) or is not a regular file, or if its folder is missing or not writable, and TemporaryFailure if
    another process writes the same target. A temporary file left by a killed process is reused. If the target is a
    symlink, the file that it points to is replaced and the link stays. `bytes_needed` is used in the error for a full
    disk only.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool = False, bytes_needed: int = 0):
        self.target = resolve_target(Path(path))
        self.overwrite = overwrite
        self._bytes_needed = bytes_needed
        self._check_target()
        self.path = build_sibling_path(self.target, PART_PATTERN)
        self._fd = _open_empty(self.path, self.target)
        self._open = True
        self.position = 0
        try:
            self._check_target()  # again: the previous holder of the lock may have created the target
        except BaseException:
            self.abort()
            raise

    def write(self, data: bytes) -> None:
        """Append `data`; raises WriteFailed."""
        self._write(data, self.position)
        self.position += len(data)

    def write_at(self, offset: int, data: bytes) -> None:
        """Overwrite bytes that were written before; raises WriteFailed."""
        self._write(data, offset)

    def clear(self) -> None:
        """Truncate the file to zero bytes; raises WriteFailed."""
        with self._disk_errors():
            os.ftruncate(self._fd, 0)
        self.position = 0

    def commit(self) -> None:
        """Sync the file, rename it to the target and sync the folder.

        Raises WriteFailed, or CannotCreateOutput if another process has created the target.
        """
        with self._disk_errors():
            os.fsync(self._fd)
        self._publish()
        with self._disk_errors():
            sync_folder(self.target.parent)
            self._close()

    def abort(self) -> None:
        """Remove the temporary file. Does nothing after `commit`, and never raises."""
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
            raise CannotCreateOutput(f"{self.target} is a folder.", "Use the name of a file in it.")
        if not stat.S_ISREG(mode):  # a rename over /dev/null would remove it
            raise CannotCreateOutput(f"{self.target} is not a regular file.", "Use another file name.")
        if not self.overwrite:
            raise CannotCreateOutput(f"{self.target} exists.", "Add --overwrite to replace it, or use another name.")

    def _publish(self) -> None:
        """Rename the file to the target. If another process has created the target, use the next free name."""
        with self._disk_errors():
            if self.overwrite:
                self._check_target()
                self.path.replace(self.target)
            elif not rename_noreplace(self.path, self.target):
                spare = next(name for name in unique_names(self.target) if rename_noreplace(self.path, name))
                reason = f"{self.target} was created by another process during the run."
                raise CannotCreateOutput(reason, f"The finished file is {spare}.")

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteFailed(*self._explain(error)) from error

    def _explain(self, error: OSError) -> tuple[str, str]:
        """Return the message and the hint for a failed write."""
        folder = self.target.parent
        if error.errno == errno.EFBIG:
            return f"{self.target} exceeds the file size limit of {folder}.", "Increase the limit (`ulimit -f`)."
        if error.errno not in NO_SPACE_ERRNOS:
            return f"Writing {self.target} failed: {error.strerror}.", "Check the disk."
        missing = max(self._bytes_needed - self.position, 0)
        more = f"up to {format_bytes(missing)} more are needed" if missing else "more is needed"
        reason = "the disk quota is exhausted" if error.errno == errno.EDQUOT else f"{_format_free_space(folder)} free"
        message = f"No space left in {folder} for {self.target.name}: {reason}, {format_bytes(self.position)} written"
        return f"{message}, {more}.", "Free some space."


def resolve_target(path: Path) -> Path:
    """Return the absolute path of the file, with a symlink resolved; raises CannotCreateOutput for a loop of links."""
    try:
        return path.resolve() if path.is_symlink() else path.absolute()
    except (OSError, RuntimeError) as error:  # a loop of symlinks
        raise CannotCreateOutput(f"{path} cannot be created: {getattr(error, 'strerror', error)}.") from error


def _open_empty(path: Path, target: Path) -> int:
    """Open `path` locked and empty, and return the descriptor.

    A run killed between linking and unlinking leaves a finished image under the temporary name too: remove that name
    and try again, as truncating the file would destroy the image.
    """
    while True:
        fd = open_locked(path, target)
        if os.fstat(fd).st_nlink == 1:
            os.ftruncate(fd, 0)
            return fd
        path.unlink()
        os.close(fd)


def _format_free_space(folder: Path) -> str:
    try:
        return format_bytes(shutil.disk_usage(folder).free)
    except OSError:
        return "nothing"
