from itertools import pairwise

import pytest

from linfusion_cli.core.geometry import Size, compute_base_size, compute_phase_sizes, split_evenly, split_rows


@pytest.mark.parametrize(
    ("target", "native_px", "multiple_px", "base"),
    [
        (Size(16384, 16384), 1024, 32, Size(1024, 1024)),
        (Size(16384, 8192), 1024, 32, Size(1408, 704)),
        (Size(8192, 16384), 1024, 32, Size(704, 1408)),
        (Size(1920, 1080), 512, 64, Size(704, 384)),
        (Size(4000, 3000), 256, 32, Size(288, 224)),
        (Size(64, 16384), 1024, 32, Size(64, 16384)),
    ],
)
def test_base_has_the_native_area_in_the_targets_proportions(target, native_px, multiple_px, base):
    assert compute_base_size(target, native_px, multiple_px) == base


def test_a_16k_picture_takes_four_doublings():
    sizes = compute_phase_sizes(Size(16384, 16384), Size(1024, 1024), 32)
    assert [size.width for size in sizes] == [1024, 2048, 4096, 8192, 16384]


def test_the_last_phase_is_the_target_rounded_up():
    assert compute_phase_sizes(Size(3001, 2999), Size(1024, 1024), 32)[-1] == Size(3008, 3008)


def test_a_target_below_the_base_runs_the_base_alone():
    assert compute_phase_sizes(Size(100, 100), Size(1024, 1024), 32) == [Size(1024, 1024)]


def test_a_double_just_below_the_target_is_left_out():
    widths = [size.width for size in compute_phase_sizes(Size(4100, 4100), Size(1024, 1024), 32)]
    assert widths == [1024, 2048, 4128]


@pytest.mark.parametrize("native_px", [256, 512, 1024])
@pytest.mark.parametrize("width", [64, 65, 257, 1000, 4099, 16384])
@pytest.mark.parametrize("height", [64, 200, 1023, 5000])
def test_any_size_has_a_ladder_that_reaches_it(width, height, native_px):
    target, multiple = Size(width, height), 32
    base = compute_base_size(target, native_px, multiple)
    sizes = compute_phase_sizes(target, base, multiple)
    assert sizes[0] == base
    assert all(size.width % multiple == size.height % multiple == 0 for size in sizes)
    assert sizes[-1] == target.round_up(multiple) or (len(sizes) == 1 and base.area >= target.area)
    assert all(1 < larger.area / smaller.area < 6 for smaller, larger in pairwise(sizes))


def test_bands_cover_everything_once():
    assert list(split_rows(10, 4)) == [(0, 4), (4, 8), (8, 10)]


def test_latents_are_an_exact_division():
    assert Size(64, 128).divide(8) == Size(8, 16)
    with pytest.raises(ValueError, match="not a multiple"):
        Size(60, 64).divide(8)


@pytest.mark.parametrize(("length", "most", "multiple"), [(100, 100, 1), (101, 100, 1), (2048, 64, 1), (523, 64, 1)])
def test_equal_bands_are_as_few_as_can_be_and_differ_by_a_row_at_most(length, most, multiple):
    found = list(split_evenly(length, most, multiple))
    sizes = [stop - start for start, stop in found]
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == length
    assert len(found) == -(-length // most)
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= multiple
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("length", "most"), [(262144, 32768), (273529, 32768), (70, 64), (64, 64), (1000, 256), (65, 64)]
)
def test_equal_bands_in_multiples_end_with_what_is_left(length, most):
    found = list(split_evenly(length, most, 64))
    sizes = [stop - start for start, stop in found]
    assert sum(sizes) == length
    assert max(sizes) <= most
    assert all(size % 64 == 0 for size in sizes[:-1])
    assert len(found) <= -(-length // most)
    assert max(sizes) - min(sizes) < 128 or len(sizes) <= 2
