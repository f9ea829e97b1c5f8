"""File system helpers: path checks, syncing, locking, and renaming without replacing."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

from linfusion_cli.core.errors import CannotCreateOutput, TemporaryFailure, UsageError

PART_PATTERN = ".{}.part"  # name of the temporary file of an output
MAX_NAME_BYTES = 255  # limit of the common file systems
LINK_UNSUPPORTED = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
# Some cluster file systems (Lustre without -o flock, old NFS) have no locks: the run continues without one.
LOCK_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def expand_home(text: str) -> Path:
    """Return the path with `~` and `~user` expanded; `~user` stays as it is if there is no such user."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises for an unknown user


def is_file(path: Path) -> bool:
    """Return whether the path is an accessible regular file; False for invalid names and unreadable folders."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for both


def is_folder(path: Path) -> bool:
    """Return whether the path is an accessible folder, as `is_file` does for files."""
    return os.path.isdir(path)  # noqa: PTH112


def build_sibling_path(path: Path, pattern: str) -> Path:
    """Return the path in the same folder with its name put into `pattern`, e.g. ".{}.part".

    A hash replaces the name if the result would be too long.
    """
    name = pattern.format(path.name)
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = pattern.format(hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32])
    return path.with_name(name)


def check_distinct(files: Mapping[str, Path | None]) -> None:
    """Raise UsageError if two outputs are the same file, or one is the temporary file of the other.

    The keys of `files` name the outputs in the message.
    """
    seen: dict[Path, str] = {}
    for name, path in files.items():
        for place in () if path is None else (path, build_sibling_path(path, PART_PATTERN)):
            if (other := seen.setdefault(_resolve(place), name)) != name:
                raise UsageError(f"{name} {str(place)!r} is the same file as {other}.", "Use another file name.")


def _resolve(path: Path) -> Path:
    """Return the path without symlinks, or as it is for a loop of links: opening it fails later."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path


def sync_folder(folder: Path) -> None:
    """Sync a folder, which writes created, renamed and removed names to the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot sync a folder
            raise
    finally:
        os.close(fd)


def rename_noreplace(path: Path, target: Path) -> bool:
    """Rename `path` to `target` and return True, or False if `target` exists.

    A hard link, unlike a rename, never replaces an existing file. Raises OSError.
    """
    try:
        target.hardlink_to(path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in LINK_UNSUPPORTED:
            raise
        if os.path.lexists(target):
            return False
        path.rename(target)
        return True
    path.unlink()
    return True


def unique_names(path: Path) -> Iterator[Path]:
    """Yield a-2.tif, a-3.tif … for a.tif."""
    return (path.with_stem(f"{path.stem}-{number}") for number in count(2))


def open_locked(path: Path, target: Path) -> int:
    """Open `path`, create it if it is missing, lock it for the run that writes `target`, and return the descriptor.

    Raises TemporaryFailure if another process has the lock, UsageError if this process has it (it would wait for
    itself), and CannotCreateOutput if the file cannot be created. Locks end with their process. Another run may remove
    its file between our open and our lock: the lock is then on a file without a name, and the loop tries again.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise create_error(target.parent, error) from error
        try:
            if _is_locked_here(fd):
                reason = f"{target} would be written twice by this run: two of its files have this name."
                raise UsageError(reason, "Use another file name.")
            _lock(fd, target)
            if is_same_file(fd, path):
                _locked_here[fd] = _inode(fd)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def create_error(folder: Path, error: OSError) -> CannotCreateOutput:
    """Return the error for a file that cannot be created in `folder`.

    ENOENT alone does not mean that the folder is missing: /proc returns it, too.
    """
    if isinstance(error, FileNotFoundError) and not is_folder(folder):
        return CannotCreateOutput(f"The folder {folder} does not exist.", "Create it first.")
    return CannotCreateOutput(f"Cannot create a file in {folder}: {error.strerror}.", "Use another folder.")


def is_same_file(fd: int, path: Path) -> bool:
    """Return whether `path` names the open file `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


# Descriptors of the files that this process has locked, with the inode of each. Closed descriptors are not removed,
# but the system reuses their numbers, so there are never more entries than files open at once.
_locked_here: dict[int, tuple[int, int] | None] = {}


def _is_locked_here(fd: int) -> bool:
    """Return whether this process has locked the file of `fd` through another descriptor that is still open."""
    inode = _inode(fd)
    return any(other != fd and locked == inode == _inode(other) for other, locked in _locked_here.items())


def _inode(fd: int) -> tuple[int, int] | None:
    """Return device and inode of an open file, or None if `fd` is closed."""
    try:
        stat = os.fstat(fd)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _lock(fd: int, target: Path) -> None:
    """Lock the file without waiting, or do nothing on file systems without locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TemporaryFailure(
            f"Another run is writing {target}.", "Wait for it to end, or use another file name."
        ) from error
    except OSError as error:
        if error.errno not in LOCK_UNSUPPORTED:
            raise CannotCreateOutput(f"{target} cannot be locked: {error.strerror}.") from error
