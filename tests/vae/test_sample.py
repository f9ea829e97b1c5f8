"""Sample positions are evenly spread and inside the image; a small image is sampled completely."""

import pytest

from linfusion_cli.core.geometry import Size
from linfusion_cli.vae.sample import Sample

SIZES = [Size(512, 512), Size(2048, 1024), Size(100, 700), Size(33, 600)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [16, 64, 256])
def test_cores_are_inside_the_image_and_do_not_overlap(size, count):
    sample = Sample.on_grid(size, count, 8)
    assert 0.6 * min(count, size.area // 200) <= len(sample.corners) <= 1.5 * count
    assert all(0 <= top <= size.height - 8 and 0 <= left <= size.width - 8 for top, left in sample.corners)
    places = {(top + i, left + j) for top, left in sample.corners for i in range(8) for j in range(8)}
    assert len(places) == 64 * len(sample.corners)  # no overlap


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("halo", [0, 3, 18, 100])
def test_patches_have_equal_sizes_and_halos_up_to_the_edges_of_the_image(size, halo):
    sample = Sample.on_grid(size, 64, 8)
    patch = sample.patch_size(halo)
    for (top, left), (core_top, core_left) in zip(sample.patch_corners(halo), sample.corners, strict=True):
        for start, core, side, length in (
            (top, core_top, patch.height, size.height),
            (left, core_left, patch.width, size.width),
        ):
            assert start >= 0 and start + side <= length
            assert start <= max(0, core - halo) and start + side >= min(length, core + 8 + halo)


def test_a_small_image_is_sampled_completely():
    assert Sample.on_grid(Size(30, 20), 64, 8) == Sample.full(Size(30, 20))


def test_sample_positions_are_reproducible():
    assert Sample.on_grid(Size(512, 300), 64, 8) == Sample.on_grid(Size(512, 300), 64, 8)


@pytest.mark.parametrize("count", [1, 100, 1024])
def test_pixels_are_spread_over_the_cores(count):
    sample = Sample.on_grid(Size(512, 512), 64, 8)
    pixels = sample.pick_pixels(count)
    assert len(set(pixels)) == len(pixels) and {index for index, *_ in pixels} == set(range(64))
    assert 64 <= len(pixels) <= count + 64
    assert all(0 <= row < 8 and 0 <= column < 8 for _, row, column in pixels)


def test_at_most_all_pixels_are_picked():
    sample = Sample.full(Size(7, 5))
    pixels = [(0, y, x) for y in range(5) for x in range(7)]
    assert sorted(sample.pick_pixels(35)) == sorted(sample.pick_pixels(1000)) == pixels
