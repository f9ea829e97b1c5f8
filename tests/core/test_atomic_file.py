import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest

from linfusion_cli.core import fs
from linfusion_cli.core.errors import CannotCreateOutput, TemporaryFailure, WriteFailed
from linfusion_cli.images import AtomicFile, open_sink, read_info
from tests.images.conftest import list_files, make_image

HOLDER = """
import sys, time
from linfusion_cli.images import AtomicFile
file = AtomicFile(sys.argv[1])
file.write(b"half an image" * 1000)
print("ready", flush=True)
time.sleep(60)
"""


def create(path, content=b"new", **options):
    with AtomicFile(path, **options) as file:
        file.write(content)
        file.commit()


@contextmanager
def holder(path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("links", [True, False])
def test_the_name_appears_only_when_complete(tmp_path, monkeypatch, overwrite, links):
    if not links:
        monkeypatch.setattr(type(tmp_path), "hardlink_to", failing(errno.EPERM))
    with AtomicFile(tmp_path / "a.tif", overwrite) as file:
        file.write(b"0123")
        file.write_at(1, b"xy")
        assert list_files(tmp_path) == [".a.tif.part"]
        file.commit()
    assert list_files(tmp_path) == ["a.tif"]
    assert (tmp_path / "a.tif").read_bytes() == b"0xy3"


def test_leaving_without_commit_removes_it(tmp_path):
    with AtomicFile(tmp_path / "a.tif") as file:
        file.write(b"0123")
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_mode_follows_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        create(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_an_existing_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(CannotCreateOutput, match="exists.*--overwrite") as caught:
        AtomicFile(tmp_path / "a")
    assert caught.value.exit_code == 73
    assert list_files(tmp_path) == ["a"]


def test_overwrite_replaces_only_at_the_end(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with AtomicFile(tmp_path / "a", overwrite=True) as file:
        file.write(b"new")
        assert (tmp_path / "a").read_bytes() == b"old"
        file.commit()
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("links", [True, False])
def test_a_target_that_appears_meanwhile_is_kept_and_so_is_the_work(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(type(tmp_path), "hardlink_to", failing(errno.EOPNOTSUPP))
    (tmp_path / "a-2.tif").write_bytes(b"older")
    with pytest.raises(CannotCreateOutput, match=r"a-3\.tif"), AtomicFile(tmp_path / "a.tif") as file:
        file.write(b"ours")
        (tmp_path / "a.tif").write_bytes(b"theirs")
        file.commit()
    assert list_files(tmp_path) == ["a-2.tif", "a-3.tif", "a.tif"]
    assert [(tmp_path / name).read_bytes() for name in list_files(tmp_path)] == [b"older", b"ours", b"theirs"]


def test_folders_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    for path, reason in [
        (tmp_path, "is a folder"),
        (tmp_path / "fifo", "not a regular file"),
        ("/dev/null", "not a regular file"),
        (tmp_path / "missing" / "a", "does not exist"),
        (tmp_path / "file" / "a", "cannot be created"),
        (tmp_path / ("a" * 256), "cannot be created"),
        ("/proc/a", "in /proc: "),
    ]:
        with pytest.raises(CannotCreateOutput, match=reason):
            AtomicFile(path, overwrite=True)
    assert list_files(tmp_path) == ["fifo", "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_that_refuses(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CannotCreateOutput, match=re.escape(str(tmp_path))):
        AtomicFile(tmp_path / "a")


@pytest.mark.parametrize("name", ["a" * 249, "a" * 250, "é" * 127, "a" * 251 + ".tif"])
def test_long_names(tmp_path, name):
    create(tmp_path / name)
    assert list_files(tmp_path) == [name]


def test_a_symlink_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real/a")
    with pytest.raises(CannotCreateOutput, match="exists"):
        AtomicFile(tmp_path / "link")
    create(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_bytes() == b"new"
    assert list_files(tmp_path / "real") == ["a"]


def test_a_symlink_to_nothing_and_a_loop(tmp_path):
    (tmp_path / "link").symlink_to("later")
    create(tmp_path / "link")
    assert (tmp_path / "later").read_bytes() == b"new"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CannotCreateOutput):
        AtomicFile(tmp_path / "loop", overwrite=True)


def test_the_second_run_is_told_to_try_again(tmp_path):
    with holder(tmp_path / "a"):
        with pytest.raises(TemporaryFailure) as caught:
            AtomicFile(tmp_path / "a", overwrite=True)
        assert caught.value.exit_code == 75
        assert list_files(tmp_path) == [".a.part"]  # of the other run


def test_what_a_killed_run_left_is_taken_over(tmp_path):
    with holder(tmp_path / "a") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert list_files(tmp_path) == [".a.part"]
        create(tmp_path / "a")
    assert list_files(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_killed_between_link_and_unlink(tmp_path):
    """The temporary name then belongs to a finished image, which the next run must not truncate."""
    (tmp_path / "a").write_bytes(b"finished")
    (tmp_path / ".a.part").hardlink_to(tmp_path / "a")
    with AtomicFile(tmp_path / "a", overwrite=True) as file:
        file.write(b"x")
        assert (tmp_path / "a").read_bytes() == b"finished"
    assert list_files(tmp_path) == ["a"]


def test_the_lock_is_on_the_file_that_has_the_name(tmp_path, monkeypatch):
    """The previous holder ends between our open and our lock, and removes its file."""
    lock, calls = fs._lock, []

    def slow_lock(fd, target):
        calls.append(fd)
        if len(calls) == 1:
            (tmp_path / ".a.part").unlink()
        lock(fd, target)

    monkeypatch.setattr(fs, "_lock", slow_lock)
    create(tmp_path / "a")
    assert len(calls) == 2
    assert (tmp_path / "a").read_bytes() == b"new"


def test_no_locks_on_this_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(fs.fcntl, "flock", failing(errno.ENOSYS))
    create(tmp_path / "a")
    assert list_files(tmp_path) == ["a"]


def failing(code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_disk_errors(tmp_path, info, monkeypatch, code, call):
    sink = open_sink(tmp_path / "out.png", "png", (64, 4096), 8, info)
    monkeypatch.setattr(os, call, failing(code))
    with pytest.raises(WriteFailed, match="out.png") as caught:
        for _ in range(64):
            sink.write(make_image(64, 64))
        sink.close()
    assert caught.value.exit_code == 74
    assert str(tmp_path) in str(caught.value)
    if code == errno.ENOSPC:
        assert "more are needed" in str(caught.value)
    assert list_files(tmp_path) == []


def test_short_writes_are_completed(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    create(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_file_size_limit(tmp_path, info):
    """Get the real error of the kernel, in a child process, as the limit applies to a whole process."""
    code = f"""
import resource, numpy as np
from linfusion_cli.core.errors import WriteFailed
from linfusion_cli.images import ImageInfo, open_sink
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, {resource.RLIM_INFINITY}))
sink = open_sink({str(tmp_path / "out.tif")!r}, "tiff", (2000, 2000), 8, ImageInfo("s", 72, {{}}, "", "", ""), "none")
try:
    sink.write(np.zeros((2000, 2000, 3), np.uint8))
    sink.close()
except WriteFailed as error:
    raise SystemExit(error.exit_code)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 74
    assert list_files(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="requires root")
@pytest.mark.parametrize("format", ["tiff", "png", "jpeg"])
def test_a_full_disk(tmp_path, info, format):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(WriteFailed, match="No space left"):
            sink = open_sink(tmp_path / "out", format, (2000, 2000), 8, info)
            sink.write(make_image(2000, 2000))
            sink.close()
        assert list_files(tmp_path) == []
        sink = open_sink(tmp_path / "out", format, (64, 64), 8, info)
        sink.write(make_image(64, 64))
        sink.close()
        assert read_info(tmp_path / "out").height_px == 64
    finally:
        subprocess.run(["umount", tmp_path], check=True)
