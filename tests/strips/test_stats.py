"""Statistics accumulated in strips equal those of the map, even if the mean is many deviations away from zero."""

from functools import reduce
from operator import add

import pytest
import torch
from torch import nn

from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.stats import Moments, group_affine


def accumulate_moments(rows: torch.Tensor, height: int) -> Moments:
    """Return the moments of a map [B, H, W, C], accumulated strip by strip."""
    return reduce(add, map(Moments.from_rows, rows.split(height, dim=1))).reduce(SingleDevice())


def create_drifting_map(batch: int, channels: int) -> torch.Tensor:
    """Return a map with a mean of about 50 standard deviations, which changes from row to row."""
    torch.manual_seed(0)
    rows = torch.randn(batch, 61, 17, channels, dtype=torch.float64)
    return rows + 50 + torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("height", [1, 7, 61])
def test_moments_of_strips_are_those_of_the_map(height):
    rows = create_drifting_map(2, 6)
    result = accumulate_moments(rows.float(), height)
    assert result.count == 61 * 17
    torch.testing.assert_close(result.mean, rows.mean(dim=(1, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.m2 / result.count, rows.var(dim=(1, 2), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("parts", [[24], [16, 8], [14, 10], [5, 5, 14]])
@pytest.mark.parametrize("height", [1, 16])
def test_group_norm_from_strips_is_that_of_the_whole_map(parts, height):
    """Groups of six channels extend over several parts in most cases. The reference is computed in fp64."""
    rows = create_drifting_map(2, 24).float()
    norm = nn.GroupNorm(4, 24, eps=1e-5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    moments = Moments.concat_channels([accumulate_moments(part, height) for part in rows.split(parts, dim=-1)])
    scale, shift = group_affine(norm, moments)
    expected = norm.double()(rows.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    result = rows * scale + shift
    assert result.dtype == torch.float32
    assert (result - expected).norm() / expected.norm() <= 1e-5


def test_halves_are_normalised_in_fp32():
    rows = create_drifting_map(1, 8).half()
    norm = nn.GroupNorm(2, 8).half()
    scale, shift = group_affine(norm, accumulate_moments(rows, 9))
    assert scale.dtype == shift.dtype == torch.float32
    expected = norm.float()(rows.float().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(rows * scale + shift, expected, rtol=1e-3, atol=1e-3)
