"""Bounded memory, and what happens when something goes wrong in the middle."""

import dataclasses
import threading
import time
import tracemalloc

import numpy as np
import pytest

from linfusion_cli.images import PreviewSink, open_sink, read_info
from linfusion_cli.images.write import jpeg, png, tiff
from linfusion_cli.images.write.pool import OrderedPool
from tests.images.conftest import left_in, make_image

FORMATS = ["tiff", "png", "jpeg"]
ENCODERS = {"tiff": (tiff, "_encode"), "png": (png, "_encode"), "jpeg": (jpeg, "encode_jpeg")}


def open_one(folder, format, info, size=(64, 64), **options):
    if format == "preview":
        return PreviewSink(folder / "out.jpg", size, 8, info)
    return open_sink(folder / "out", format, size, 8, info, **options)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_pool_keeps_order_and_its_limit(threads):
    results, alive, most = [], 0, 0
    lock = threading.Lock()

    def job(number):
        time.sleep(0.001 * (number % 4))
        return number

    def collect(number):
        nonlocal alive
        with lock:
            alive -= 1
        results.append(number)

    pool = OrderedPool(threads, collect)
    for number in range(60):
        pool.submit(job, number)
        alive += 1
        most = max(most, alive)
    pool.finish()
    assert results == list(range(60))
    assert most <= pool.limit == 2 * threads


@pytest.mark.parametrize("format", FORMATS)
def test_blocks_in_flight_are_bounded(tmp_path, info, monkeypatch, format):
    """A slow encoder must hold back the writer."""
    module, name = ENCODERS[format]
    encode, started, collected, most = getattr(module, name), 0, 0, 0

    def slow(*arguments):
        time.sleep(0.003)
        return encode(*arguments)

    def submitting(pool, *arguments):
        nonlocal started, most
        submit(pool, *arguments)
        started += 1
        most = max(most, started - collected)

    def collecting(pool):
        nonlocal collected
        collect(pool)
        collected += 1

    submit, collect = OrderedPool.submit, OrderedPool._collect_oldest
    monkeypatch.setattr(module, name, slow)
    monkeypatch.setattr(png, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(OrderedPool, "submit", submitting)
    monkeypatch.setattr(OrderedPool, "_collect_oldest", collecting)
    sink = open_one(tmp_path, format, info, (300, 12_000), threads=2)
    for _ in range(120):
        sink.write(np.zeros((100, 300, 3), np.uint8))
    sink.close()
    assert started >= 20
    assert started == collected
    assert most <= 4


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
def test_memory_does_not_grow_with_height(tmp_path, info, format):
    rows = make_image(1024, 256)

    def peak(height_px, folder):
        folder.mkdir()
        sink = open_one(folder, format, info, (1024, height_px), **({} if format == "preview" else {"threads": 1}))
        tracemalloc.start()
        for _ in range(height_px // 256):
            sink.write(rows)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        sink.abort()
        return most

    peak(2560, tmp_path / "imports")
    assert peak(7680, tmp_path / "tall") <= 1.25 * peak(2560, tmp_path / "short") + 1e6


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
def test_too_many_rows(tmp_path, info, format):
    sink = open_one(tmp_path, format, info)
    sink.write(make_image(64, 60))
    with pytest.raises(ValueError, match="row 65"):
        sink.write(make_image(64, 5))
    assert left_in(tmp_path) == []
    with pytest.raises(ValueError):
        sink.close()


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
def test_too_few_rows(tmp_path, info, format):
    sink = open_one(tmp_path, format, info)
    sink.write(make_image(64, 63))
    with pytest.raises(ValueError, match="63 rows"):
        sink.close()
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
@pytest.mark.parametrize(
    "rows", [make_image(63, 4), make_image(64, 4, 16), make_image(64, 4)[..., 0]], ids=["W", "bits", "2d"]
)
def test_wrong_rows(tmp_path, info, format, rows):
    with pytest.raises(ValueError, match="not uint8"):
        open_one(tmp_path, format, info).write(rows)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("error", [MemoryError("no"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_a_thread_surfaces(tmp_path, info, monkeypatch, format, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(*ENCODERS[format], fail)
    sink = open_one(tmp_path, format, info, (64, 4096))
    with pytest.raises(type(error)):
        for _ in range(64):
            sink.write(make_image(64, 64))
        sink.close()
    assert left_in(tmp_path) == []
    with pytest.raises(ValueError, match="aborted"):
        sink.write(make_image(64, 64))
    with pytest.raises(ValueError, match="aborted"):
        sink.close()


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
def test_abort_leaves_nothing(tmp_path, info, format):
    sink = open_one(tmp_path, format, info, (64, 2000))
    sink.write(make_image(64, 1500))
    assert len(left_in(tmp_path)) == 1
    sink.abort()
    sink.abort()
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
def test_abort_and_close_after_close_do_nothing(tmp_path, info, format):
    sink = open_one(tmp_path, format, info)
    sink.write(make_image(64, 64))
    sink.close()
    sink.abort()
    sink.close()
    (name,) = left_in(tmp_path)
    assert read_info(tmp_path / name).width_px == 64
    with pytest.raises(ValueError):
        sink.write(make_image(64, 1))
    assert left_in(tmp_path) == [name]


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_that_cannot_be_written_fails_before_any_work(tmp_path, info, format):
    info = dataclasses.replace(info, request={"model": object()})
    with pytest.raises(TypeError):
        open_one(tmp_path, format, info)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
def test_rows_may_be_views_and_are_copied(tmp_path, info, format):
    pixels = np.zeros((64, 64, 3), np.uint8)
    sink = open_one(tmp_path, format, info)
    buffer = np.zeros((128, 64, 3), np.uint8)
    sink.write(buffer[::-2])
    buffer[:] = 255
    sink.close()
    found = pytest.importorskip("pyvips").Image.new_from_file(str(tmp_path / "out")).numpy()
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
def test_a_file_says_something_else_of_itself_until_its_first_rows(tmp_path, info, format):
    """It is the file that said so from the beginning, whichever of both texts is the longer one."""
    other, rows, made = dataclasses.replace(info, request={"steps": 2}), make_image(64, 64), []
    for number, told in enumerate([(other,), (info, other), (info, info, other)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        sink = open_one(folder, format, told[0])
        for again in told[1:]:
            sink.update_info(again)
        sink.write(rows)
        sink.close()
        sink.update_info(info)  # too late, and no harm
        made.append(next(folder.iterdir()).read_bytes())
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("format", FORMATS)
def test_after_its_first_rows_it_is_too_late(tmp_path, info, format):
    sink = open_one(tmp_path, format, info)
    sink.write(make_image(64, 2))
    with pytest.raises(ValueError, match="2 rows were written"):
        sink.update_info(info)
    assert left_in(tmp_path) == []
