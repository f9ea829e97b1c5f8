"""The seam for many devices holds: ranks that have a part of the rows each predict what one predicts."""

import copy

import pytest
import torch

from linfusion_cli.strips.ops import Strips, StripSize
from linfusion_cli.strips.storage import Storage
from linfusion_cli.unet.forward import strip_forward
from tests.fakes import Rank, on_ranks
from tests.unet.test_forward import (
    CPU,
    FAMILIES,
    TIMESTEP,
    error,
    plain,
    random_condition,
    with_linear_attention,
)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("family", ["xl", "sd15"])
def test_parts_of_the_rows_are_the_whole(family, count, dilation):
    with with_linear_attention(FAMILIES[family], torch.float64) as unet:
        latents, condition = torch.randn(1, 4, 64, 20, dtype=torch.float64), random_condition(unet)
        expected = plain(unet, latents, condition, dilation)

        def part(rank: Rank) -> torch.Tensor:
            run = Strips(StripSize(3, 64), Storage("device", CPU, torch.float64), rank, dilation)
            rows = latents.chunk(count, dim=2)[rank.number]
            return strip_forward(copy.deepcopy(unet), run, rows, TIMESTEP, condition)

        found = torch.cat(on_ranks(count, part), dim=2)
    assert error(found, expected) <= 1e-12
