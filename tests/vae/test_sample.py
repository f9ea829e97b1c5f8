"""Where statistics are taken: evenly, inside the picture, and everywhere if it is small."""

import pytest

from linfusion_cli.core.geometry import Size
from linfusion_cli.vae.sample import Sample

SIZES = [Size(512, 512), Size(2048, 1024), Size(100, 700), Size(33, 600)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [16, 64, 256])
def test_cores_lie_inside_each_in_a_cell_of_its_own(size, count):
    sample = Sample.spread(size, count, 8)
    assert 0.6 * min(count, size.area // 200) <= len(sample.corners) <= 1.5 * count
    assert all(0 <= top <= size.height - 8 and 0 <= left <= size.width - 8 for top, left in sample.corners)
    places = {(top + i, left + j) for top, left in sample.corners for i in range(8) for j in range(8)}
    assert len(places) == 64 * len(sample.corners)  # no two overlap


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("halo", [0, 3, 18, 100])
def test_patches_have_one_size_lie_inside_and_reach_as_far_as_there_is_image(size, halo):
    sample = Sample.spread(size, 64, 8)
    window = sample.window(halo)
    for (top, left), (core_top, core_left) in zip(sample.windows(halo), sample.corners, strict=True):
        for start, core, side, whole in (
            (top, core_top, window.height, size.height),
            (left, core_left, window.width, size.width),
        ):
            assert start >= 0 and start + side <= whole
            assert start <= max(0, core - halo) and start + side >= min(whole, core + 8 + halo)


def test_a_small_image_is_its_own_sample():
    assert Sample.spread(Size(30, 20), 64, 8) == Sample.whole(Size(30, 20))


def test_the_same_image_is_sampled_in_the_same_places():
    assert Sample.spread(Size(512, 300), 64, 8) == Sample.spread(Size(512, 300), 64, 8)


@pytest.mark.parametrize("count", [1, 100, 1024])
def test_pixels_are_spread_over_the_cores(count):
    sample = Sample.spread(Size(512, 512), 64, 8)
    pixels = sample.pixels(count)
    assert len(set(pixels)) == len(pixels) and {patch for patch, *_ in pixels} == set(range(64))
    assert 64 <= len(pixels) <= count + 64
    assert all(0 <= row < 8 and 0 <= column < 8 for _, row, column in pixels)


def test_all_pixels_are_taken_where_there_are_no_more():
    sample = Sample.whole(Size(7, 5))
    assert sorted(sample.pixels(35)) == sorted(sample.pixels(1000)) == [(0, y, x) for y in range(5) for x in range(7)]
