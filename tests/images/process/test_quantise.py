"""Quantisation to 8 and 16 bits, with and without dithering."""

import numpy as np
import pytest

from linfusion_cli.images.process.quantise import quantise


@pytest.mark.parametrize(("bits", "dtype", "steps"), [(8, np.uint8, 255), (16, np.uint16, 65535)])
def test_values_are_rounded_to_nearest(bits, dtype, steps):
    rows = np.random.default_rng(0).random((5, 7, 3), dtype=np.float32)
    result = quantise(rows, 0, bits)
    assert result.dtype == dtype and np.abs(result - rows.astype(float) * steps).max() <= 0.5 + 1e-2
    assert quantise(np.ones((1, 1, 3), np.float32), 0, bits).max() == steps


def test_dithering_keeps_the_mean():
    rows = np.full((200, 200, 3), 100.3 / 255, np.float32)
    result = quantise(rows, 0, 8, seed=1)
    assert set(np.unique(result)) == {100, 101} and result.mean() == pytest.approx(100.3, abs=0.01)


def test_values_on_a_step_are_unchanged():
    rows = np.stack([np.zeros((4, 4)), np.ones((4, 4)), np.full((4, 4), 0.2)], axis=-1).astype(np.float32)
    assert (quantise(rows, 0, 8, seed=1) == [0, 255, 51]).all()


def test_dithering_depends_on_the_seed_but_not_on_the_strips():
    rows = np.random.default_rng(0).random((40, 9, 3), dtype=np.float32)
    before = rows.copy()
    parts = [quantise(rows[top : top + 7], top, 8, seed=5) for top in range(0, 40, 7)]
    assert (np.concatenate(parts) == quantise(rows, 0, 8, seed=5)).all() and (rows == before).all()
    assert (quantise(rows, 0, 8, seed=6) != quantise(rows, 0, 8, seed=5)).any()
