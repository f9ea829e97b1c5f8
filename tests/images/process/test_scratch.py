from pathlib import Path

import numpy as np
import pytest

from linfusion_cli.core.errors import WriteFailed
from linfusion_cli.images.process.resize import resize_region
from linfusion_cli.images.process.scratch import ScratchImage


@pytest.mark.parametrize("in_memory", [False, True])
def test_regions_are_stored_with_sixteen_bits_and_leave_no_file(tmp_path, in_memory):
    rows = np.random.default_rng(0).random((37, 21, 3), dtype=np.float32)
    with ScratchImage(None if in_memory else tmp_path, 21, 37) as scratch:
        for top in range(0, 37, 10):
            scratch.append(rows[top : top + 10])
        assert not list(tmp_path.iterdir())
        np.testing.assert_allclose(scratch.read(0, 37), rows, atol=0.5 / 65535 + 1e-7)
        np.testing.assert_allclose(scratch.read(5, 9), rows[5:9], atol=0.5 / 65535 + 1e-7)
        np.testing.assert_allclose(scratch.read(5, 9, 3, 20), rows[5:9, 3:20], atol=0.5 / 65535 + 1e-7)


@pytest.mark.parametrize("target", [(140, 100), (151, 111), (33, 20), (70, 50), (64, 200)])
def test_resizing_by_regions_equals_resizing_the_whole_image(target):
    image, source = np.random.default_rng(1).random((50, 70, 3), dtype=np.float32), (70, 50)
    read = lambda top, bottom, left, right: image[top:bottom, left:right]  # noqa: E731
    whole = resize_region(read, source, target, (0, target[1], 0, target[0]))
    assert whole.shape == (target[1], target[0], 3)
    for top in range(0, target[1], 7):
        bottom = min(top + 7, target[1])
        for left in range(0, target[0], 11):
            right = min(left + 11, target[0])
            part = resize_region(read, source, target, (top, bottom, left, right))
            np.testing.assert_allclose(part, whole[top:bottom, left:right], atol=2e-6)


def test_resizing_reads_only_what_it_needs():
    image, read_sizes = np.zeros((1000, 1000, 3), np.float32), []

    def read(top, bottom, left, right):
        read_sizes.extend([bottom - top, right - left])
        return image[top:bottom, left:right]

    resize_region(read, (1000, 1000), (2000, 2000), (500, 516, 0, 32))
    assert read_sizes[0] <= 8 + 2 * 5 and read_sizes[1] <= 16 + 5


def test_a_full_disk_is_a_failed_write(monkeypatch):
    scratch = ScratchImage(Path("/dev/shm"), 100, 100)
    scratch._file.close()
    scratch._file = open("/dev/full", "r+b", buffering=0)  # noqa: PTH123, SIM115 - closed below, as close() would
    with pytest.raises(WriteFailed, match="No space left"), scratch:
        scratch.append(np.zeros((10, 100, 3), np.float32))


def test_a_missing_folder_is_a_failed_write(tmp_path):
    with pytest.raises(WriteFailed, match="stored in .*none"):
        ScratchImage(tmp_path / "none", 1, 1)


def test_a_truncated_scratch_file_is_an_error(tmp_path):
    with ScratchImage(tmp_path, 3, 5) as scratch, pytest.raises(WriteFailed, match="too short"):
        scratch.append(np.zeros((5, 3, 3), np.float32))
        scratch._file.truncate(10)
        scratch.read(0, 5)


def test_reading_missing_rows_is_an_error(tmp_path):
    with ScratchImage(tmp_path, 3, 5) as scratch, pytest.raises(ValueError, match="not all appended"):
        scratch.append(np.zeros((2, 3, 3), np.float32))
        scratch.read(1, 4)
