"""Folders are synced after changes of their names."""

import errno
import os

import pytest

from linfusion_cli.core.fs import sync_folder


def test_a_folder_is_synced_and_left_closed(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((fd, os.fstat(fd).st_ino)))
    sync_folder(tmp_path)
    ((fd, inode),) = synced
    assert inode == tmp_path.stat().st_ino
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(("code", "passes"), [(errno.EINVAL, True), (errno.EIO, False), (errno.EROFS, False)])
def test_a_file_system_that_cannot_sync_folders_is_no_failure_but_others_are(tmp_path, monkeypatch, code, passes):
    def fail(fd):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    if passes:
        sync_folder(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            sync_folder(tmp_path)
