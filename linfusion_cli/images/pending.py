"""A file that gets its name only when it is complete."""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

from linfusion_cli.errors import CannotCreate, TryAgain, WriteFailed
from linfusion_cli.units import format_bytes, is_folder

NAME_BYTES = 255
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Some cluster file systems (Lustre without -o flock, old NFS) have no locks: there we go on without one.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


class PendingFile:
    """A temporary file `.NAME.part` beside its target, locked, and renamed to the target by `commit`.

    Opening checks everything that can be checked before hours of work: raises CannotCreate when the target exists
    (without `overwrite`), is no regular file, or its folder is missing or refuses, and TryAgain when another process
    writes the same target. A temporary file left by a killed process is taken over. When the target is a symlink, the
    file it points to is replaced and the link stays. `bytes_needed` is only used to say how much space was missing.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool = False, bytes_needed: int = 0):
        self.target = _resolved(Path(path))
        self.overwrite = overwrite
        self._bytes_needed = bytes_needed
        self._check_target()
        self.path = _temporary_path(self.target)
        self._fd = _open_locked(self.path, self.target)
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

    def commit(self) -> None:
        """Sync, rename to the target, sync the folder. Raises WriteFailed, or CannotCreate if the target appeared."""
        with self._disk_errors():
            os.fsync(self._fd)
        self._publish()
        with self._disk_errors():
            _sync_folder(self.target.parent)
            self._close()

    def abort(self) -> None:
        """Remove the temporary file; harmless after `commit`, never raises."""
        if not self._open:
            return
        with suppress(OSError):
            if _same_file(self._fd, self.path):
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
            raise CannotCreate(f"{self.target} cannot be created: {error.strerror}.") from error
        if stat.S_ISDIR(mode):
            raise CannotCreate(f"{self.target} is a folder.", "Name a file in it.")
        if not stat.S_ISREG(mode):  # renaming over /dev/null would remove it
            raise CannotCreate(f"{self.target} is not a regular file.", "Name a file that can be replaced.")
        if not self.overwrite:
            raise CannotCreate(f"{self.target} exists.", "Add --overwrite to replace it, or name another file.")

    def _publish(self) -> None:
        """Give the file its final name. If somebody else took that meanwhile, the work is kept beside it."""
        with self._disk_errors():
            if self.overwrite:
                self._check_target()
                self.path.replace(self.target)
            elif not self._named(self.target):
                spare = next(name for name in _spare_names(self.target) if self._named(name))
                raise CannotCreate(f"{self.target} appeared while it was being made.", f"The finished file is {spare}.")

    def _named(self, name: Path) -> bool:
        """Whether the file is called `name` now: a link, unlike a rename, never replaces what has that name."""
        try:
            name.hardlink_to(self.path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if os.path.lexists(name):
                return False
            self.path.rename(name)
            return True
        self.path.unlink()
        return True

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteFailed(*self._explain(error)) from error

    def _explain(self, error: OSError) -> tuple[str, str]:
        folder = self.target.parent
        if error.errno == errno.EFBIG:
            return f"{self.target} is larger than files may be in {folder}.", "Raise ulimit -f, or use another disk."
        if error.errno not in NO_SPACE:
            return f"Writing {self.target} failed: {error.strerror}.", "Check the disk."
        missing = max(self._bytes_needed - self.position, 0)
        more = f"up to {format_bytes(missing)} more are needed" if missing else "more is needed"
        reason = "the disk quota is used up" if error.errno == errno.EDQUOT else f"{_free(folder)} free"
        message = f"No space left in {folder} for {self.target.name}: {reason}, {format_bytes(self.position)} written"
        return f"{message}, {more}.", "Free some space or name another folder."


def _resolved(path: Path) -> Path:
    try:
        return path.resolve() if path.is_symlink() else path.absolute()
    except (OSError, RuntimeError) as error:  # a loop of symlinks
        raise CannotCreate(f"{path} cannot be created: {getattr(error, 'strerror', error)}.") from error


def _spare_names(target: Path) -> Iterator[Path]:
    """a-2.tif, a-3.tif … for a.tif."""
    return (target.with_stem(f"{target.stem}-{number}") for number in count(2))


def _temporary_path(target: Path) -> Path:
    name = f".{target.name}.part"
    if len(os.fsencode(name)) > NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]}.part"
    return target.with_name(name)


def _refused(folder: Path, error: OSError) -> CannotCreate:
    """Why no file can be made in `folder`: /proc says "no such file" too, and is there."""
    if isinstance(error, FileNotFoundError) and not is_folder(folder):
        return CannotCreate(f"The folder {folder} does not exist.", "Create it first.")
    return CannotCreate(f"{folder} refuses a new file: {error.strerror}.", "Name another one.")


def _open_locked(path: Path, target: Path) -> int:
    """The descriptor of `path`, locked and empty. The file of a finished or aborted run may vanish between opening and
    locking: then the lock is on a file without a name, and we try again."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise _refused(target.parent, error) from error
        try:
            _lock(fd, target)
            if _reusable(fd, path):
                os.ftruncate(fd, 0)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, target: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TryAgain(f"Another run is writing {target}.", "Wait for it, or name another file.") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise CannotCreate(f"{target} cannot be locked: {error.strerror}.") from error


def _reusable(fd: int, path: Path) -> bool:
    if not _same_file(fd, path):
        return False
    if os.fstat(fd).st_nlink == 1:
        return True
    path.unlink()  # a run was killed between linking and unlinking: these bytes are a finished picture
    return False


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot sync a folder
            raise
    finally:
        os.close(fd)


def _free(folder: Path) -> str:
    try:
        return format_bytes(shutil.disk_usage(folder).free)
    except OSError:
        return "nothing"
