"""Statistics of strips are those of the map, also where the mean is many deviations away from zero."""

from functools import reduce
from operator import add

import pytest
import torch
from torch import nn

from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.stats import Moments, group_affine


def gathered(rows: torch.Tensor, height: int) -> Moments:
    """The moments of a map [B, H, W, C], strip by strip."""
    return reduce(add, map(Moments.of, rows.split(height, dim=1))).of_all(SingleDevice())


def drifting(batch: int, channels: int) -> torch.Tensor:
    """A map whose mean lies 50 deviations from zero, and wanders from row to row."""
    torch.manual_seed(0)
    rows = torch.randn(batch, 61, 17, channels, dtype=torch.float64)
    return rows + 50 + torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("height", [1, 7, 61])
def test_moments_of_strips_are_those_of_the_map(height):
    rows = drifting(2, 6)
    found = gathered(rows.float(), height)
    assert found.count == 61 * 17
    torch.testing.assert_close(found.mean, rows.mean(dim=(1, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.m2 / found.count, rows.var(dim=(1, 2), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("parts", [[24], [16, 8], [14, 10], [5, 5, 14]])
@pytest.mark.parametrize("height", [1, 16])
def test_group_norm_from_strips_is_that_of_the_whole_map(parts, height):
    """Groups of six channels straddle the parts of most of these. All numbers are in fp32, the reference is not."""
    rows = drifting(2, 24).float()
    norm = nn.GroupNorm(4, 24, eps=1e-5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    moments = Moments.side_by_side([gathered(part, height) for part in rows.split(parts, dim=-1)])
    scale, shift = group_affine(norm, moments)
    expected = norm.double()(rows.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    found = rows * scale + shift
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() <= 1e-5


def test_halves_are_normalised_in_fp32():
    rows = drifting(1, 8).half()
    norm = nn.GroupNorm(2, 8).half()
    scale, shift = group_affine(norm, gathered(rows, 9))
    assert scale.dtype == shift.dtype == torch.float32
    expected = norm.float()(rows.float().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(rows * scale + shift, expected, rtol=1e-3, atol=1e-3)
