"""What a file system needs besides reading and writing."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

from linfusion_cli.core.errors import CannotCreateOutput, TemporaryFailure, UsageError
from linfusion_cli.core.units import is_folder

PART = ".{}.part"  # the temporary file of an output, by the output's name
NAME_BYTES = 255  # of a file, on every file system that matters
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
# Some cluster file systems (Lustre without -o flock, old NFS) have no locks: there we go on without one.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def sibling(path: Path, pattern: str) -> Path:
    """What lies beside `path` under its name in `pattern`, ".{}.part" say; too long a name has a hash in its place."""
    name = pattern.format(path.name)
    if len(os.fsencode(name)) > NAME_BYTES:
        name = pattern.format(hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32])
    return path.with_name(name)


def check_distinct(files: Mapping[str, Path | None]) -> None:
    """Raise UsageError where two outputs, by what they are called, are one file, or one is the temporary file of the
    other."""
    seen: dict[Path, str] = {}
    for name, path in files.items():
        for place in () if path is None else (path, sibling(path, PART)):
            if (other := seen.setdefault(_without_links(place), name)) != name:
                raise UsageError(f"{name} {str(place)!r} is the file of {other}.", "Name another file.")


def _without_links(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links, which is refused when it is opened
        return path


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk: what was created, renamed or removed in it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot sync a folder
            raise
    finally:
        os.close(fd)


def rename_noreplace(path: Path, target: Path) -> bool:
    """Whether `path` is called `target` now: a link, unlike a rename, never replaces what has that name.

    False where that is taken; raises OSError.
    """
    try:
        target.hardlink_to(path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(target):
            return False
        path.rename(target)
        return True
    path.unlink()
    return True


def unique_names(path: Path) -> Iterator[Path]:
    """a-2.tif, a-3.tif … for a.tif."""
    return (path.with_stem(f"{path.stem}-{number}") for number in count(2))


def open_locked(path: Path, target: Path) -> int:
    """The descriptor of `path`, which is made if it is missing, and locked for the run that makes `target`.

    Raises TryAgain where another process has the lock, UsageError where this one has it itself, which would wait for
    ever, and CannotCreate where there can be no such file. A lock cannot be left behind: it ends with its process. The
    file of a finished run may vanish between opening and locking: then the lock is on a file without a name, and we try
    again.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise create_error(target.parent, error) from error
        try:
            if _is_locked_here(fd):
                reason = f"{target} would be written twice by this run: two of its files have this name."
                raise UsageError(reason, "Name another file.")
            _lock(fd, target)
            if is_same_file(fd, path):
                _locked_here[fd] = _inode(fd)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def create_error(folder: Path, error: OSError) -> CannotCreateOutput:
    """Why no file can be made in `folder`: /proc says "no such file" too, and is there."""
    if isinstance(error, FileNotFoundError) and not is_folder(folder):
        return CannotCreateOutput(f"The folder {folder} does not exist.", "Create it first.")
    return CannotCreateOutput(f"{folder} refuses a new file: {error.strerror}.", "Name another one.")


def is_same_file(fd: int, path: Path) -> bool:
    """Whether `path` is the name of the open file `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


# The descriptors by which this process has locked files, and the inode of each. Closed ones are not removed, but the
# system gives their numbers to the next files, so there are never more entries than files open at once.
_locked_here: dict[int, tuple[int, int]] = {}


def _is_locked_here(fd: int) -> bool:
    """Whether this process has locked the file of `fd` by another descriptor, which is still open."""
    inode = _inode(fd)
    return any(other != fd and locked == inode == _inode(other) for other, locked in _locked_here.items())


def _inode(fd: int) -> tuple[int, int] | None:
    """Device and inode of an open file; None if `fd` was closed."""
    try:
        stat = os.fstat(fd)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _lock(fd: int, target: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TemporaryFailure(f"Another run is writing {target}.", "Wait for it, or name another file.") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise CannotCreateOutput(f"{target} cannot be locked: {error.strerror}.") from error
