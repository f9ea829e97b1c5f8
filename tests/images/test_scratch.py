from pathlib import Path

import numpy as np
import pytest

from linfusion_cli.errors import WriteFailed
from linfusion_cli.images.resize import resized_rows
from linfusion_cli.images.scratch import ScratchPicture


def test_rows_come_back_to_sixteen_bits_and_leave_no_file(tmp_path):
    rows = np.random.default_rng(0).random((37, 21, 3), dtype=np.float32)
    with ScratchPicture(tmp_path, 21, 37) as scratch:
        for top in range(0, 37, 10):
            scratch.append(rows[top : top + 10])
        assert not list(tmp_path.iterdir())
        np.testing.assert_allclose(scratch.read(0, 37), rows, atol=0.5 / 65535 + 1e-7)
        np.testing.assert_allclose(scratch.read(5, 9), rows[5:9], atol=0.5 / 65535 + 1e-7)


@pytest.mark.parametrize("target", [(140, 100), (151, 111), (33, 20), (70, 50), (64, 200)])
def test_resizing_by_rows_is_resizing_the_whole(target):
    picture = np.random.default_rng(1).random((50, 70, 3), dtype=np.float32)
    read = lambda top, bottom: picture[top:bottom]  # noqa: E731
    whole = resized_rows(read, (70, 50), target, 0, target[1])
    parts = [resized_rows(read, (70, 50), target, top, min(top + 7, target[1])) for top in range(0, target[1], 7)]
    assert whole.shape == (target[1], target[0], 3)
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-6)


def test_resizing_reads_only_what_it_needs():
    picture, read = np.zeros((1000, 8, 3), np.float32), []
    resized_rows(lambda t, b: read.append(b - t) or picture[t:b], (8, 1000), (16, 2000), 500, 516)
    assert read[0] <= 8 + 2 * 5


def test_a_full_disk_is_a_failed_write(monkeypatch):
    scratch = ScratchPicture(Path("/dev/shm"), 100, 100)
    scratch._file.close()
    scratch._file = open("/dev/full", "r+b", buffering=0)  # noqa: PTH123, SIM115 - closed below, as close() would
    with pytest.raises(WriteFailed, match="No space left"), scratch:
        scratch.append(np.zeros((10, 100, 3), np.float32))


def test_a_folder_that_refuses_is_a_failed_write(tmp_path):
    with pytest.raises(WriteFailed, match="could not be kept"):
        ScratchPicture(tmp_path / "none", 1, 1)


def test_rows_that_are_not_there_are_an_error(tmp_path):
    with ScratchPicture(tmp_path, 3, 5) as scratch, pytest.raises(ValueError, match="not all appended"):
        scratch.append(np.zeros((2, 3, 3), np.float32))
        scratch.read(1, 4)
