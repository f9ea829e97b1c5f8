"""Bounded memory, and errors in the middle of a file."""

import dataclasses
import threading
import time
import tracemalloc

import numpy as np
import pytest

from linfusion_cli.images import PreviewSink, open_sink, read_info
from linfusion_cli.images.write import jpeg, png, tiff
from linfusion_cli.images.write.pool import OrderedPool
from tests.images.conftest import list_files, make_image

FORMATS = ["tiff", "png", "jpeg"]
ENCODERS = {"tiff": (tiff, "_encode_tile"), "png": (png, "_encode_block"), "jpeg": (jpeg, "encode_jpeg")}


def open_test_sink(folder, format, info, size=(64, 64), **options):
    if format == "preview":
        return PreviewSink(folder / "out.jpg", size, 8, info)
    return open_sink(folder / "out", format, size, 8, info, **options)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_pool_keeps_the_order_and_its_limit(threads):
    results, alive, peak = [], 0, 0
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
        peak = max(peak, alive)
    pool.finish()
    assert results == list(range(60))
    assert peak <= pool.max_jobs == 2 * threads


@pytest.mark.parametrize("format", FORMATS)
def test_blocks_in_flight_are_bounded(tmp_path, info, monkeypatch, format):
    """`write` waits for a slow encoder."""
    module, name = ENCODERS[format]
    encode, started, collected, peak = getattr(module, name), 0, 0, 0

    def slow(*arguments):
        time.sleep(0.003)
        return encode(*arguments)

    def submit_and_count(pool, *arguments):
        nonlocal started, peak
        submit(pool, *arguments)
        started += 1
        peak = max(peak, started - collected)

    def collect_and_count(pool):
        nonlocal collected
        collect(pool)
        collected += 1

    submit, collect = OrderedPool.submit, OrderedPool._collect_oldest
    monkeypatch.setattr(module, name, slow)
    monkeypatch.setattr(png, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(OrderedPool, "submit", submit_and_count)
    monkeypatch.setattr(OrderedPool, "_collect_oldest", collect_and_count)
    sink = open_test_sink(tmp_path, format, info, (300, 12_000), threads=2)
    for _ in range(120):
        sink.write(np.zeros((100, 300, 3), np.uint8))
    sink.close()
    assert started >= 20
    assert started == collected
    assert peak <= 4


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
def test_memory_does_not_grow_with_height(tmp_path, info, format):
    rows = make_image(1024, 256)

    def peak(height_px, folder):
        folder.mkdir()
        sink = open_test_sink(
            folder, format, info, (1024, height_px), **({} if format == "preview" else {"threads": 1})
        )
        tracemalloc.start()
        for _ in range(height_px // 256):
            sink.write(rows)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        sink.abort()
        return peak_bytes

    peak(2560, tmp_path / "imports")
    assert peak(7680, tmp_path / "tall") <= 1.25 * peak(2560, tmp_path / "short") + 1e6


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
def test_too_many_rows(tmp_path, info, format):
    sink = open_test_sink(tmp_path, format, info)
    sink.write(make_image(64, 60))
    with pytest.raises(ValueError, match="row 65"):
        sink.write(make_image(64, 5))
    assert list_files(tmp_path) == []
    with pytest.raises(ValueError):
        sink.close()


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
def test_too_few_rows(tmp_path, info, format):
    sink = open_test_sink(tmp_path, format, info)
    sink.write(make_image(64, 63))
    with pytest.raises(ValueError, match="63 rows"):
        sink.close()
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
@pytest.mark.parametrize(
    "rows", [make_image(63, 4), make_image(64, 4, 16), make_image(64, 4)[..., 0]], ids=["W", "bits", "2d"]
)
def test_wrong_rows(tmp_path, info, format, rows):
    with pytest.raises(ValueError, match="not uint8"):
        open_test_sink(tmp_path, format, info).write(rows)
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("error", [MemoryError("no"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_a_thread_surfaces(tmp_path, info, monkeypatch, format, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(*ENCODERS[format], fail)
    sink = open_test_sink(tmp_path, format, info, (64, 4096))
    with pytest.raises(type(error)):
        for _ in range(64):
            sink.write(make_image(64, 64))
        sink.close()
    assert list_files(tmp_path) == []
    with pytest.raises(ValueError, match="aborted"):
        sink.write(make_image(64, 64))
    with pytest.raises(ValueError, match="aborted"):
        sink.close()


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
def test_abort_leaves_nothing(tmp_path, info, format):
    sink = open_test_sink(tmp_path, format, info, (64, 2000))
    sink.write(make_image(64, 1500))
    assert len(list_files(tmp_path)) == 1
    sink.abort()
    sink.abort()
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
def test_abort_and_close_after_close_do_nothing(tmp_path, info, format):
    sink = open_test_sink(tmp_path, format, info)
    sink.write(make_image(64, 64))
    sink.close()
    sink.abort()
    sink.close()
    (name,) = list_files(tmp_path)
    assert read_info(tmp_path / name).width_px == 64
    with pytest.raises(ValueError):
        sink.write(make_image(64, 1))
    assert list_files(tmp_path) == [name]


@pytest.mark.parametrize("format", FORMATS)
def test_invalid_metadata_fail_before_any_work(tmp_path, info, format):
    info = dataclasses.replace(info, request={"model": object()})
    with pytest.raises(TypeError):
        open_test_sink(tmp_path, format, info)
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_copied(tmp_path, info, format):
    pixels = np.zeros((64, 64, 3), np.uint8)
    sink = open_test_sink(tmp_path, format, info)
    buffer = np.zeros((128, 64, 3), np.uint8)
    sink.write(buffer[::-2])
    buffer[:] = 255
    sink.close()
    result = pytest.importorskip("pyvips").Image.new_from_file(str(tmp_path / "out")).numpy()
    np.testing.assert_array_equal(result, pixels)


@pytest.mark.parametrize("format", [*FORMATS, "preview"])
def test_metadata_can_be_replaced_before_the_first_rows(tmp_path, info, format):
    """The file equals one that had the final metadata from the start, with a longer or shorter request."""
    other, rows, files = dataclasses.replace(info, request={"steps": 2}), make_image(64, 64), []
    for number, infos in enumerate([(other,), (info, other), (info, info, other)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        sink = open_test_sink(folder, format, infos[0])
        for update in infos[1:]:
            sink.update_info(update)
        sink.write(rows)
        sink.close()
        sink.update_info(info)  # does nothing after close
        files.append(next(folder.iterdir()).read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_cannot_be_replaced_after_the_first_rows(tmp_path, info, format):
    sink = open_test_sink(tmp_path, format, info)
    sink.write(make_image(64, 2))
    with pytest.raises(ValueError, match="2 rows"):
        sink.update_info(info)
    assert list_files(tmp_path) == []
