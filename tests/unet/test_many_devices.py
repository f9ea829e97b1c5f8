"""The seam for many devices holds: ranks that have a part of the rows each predict what one predicts."""

import copy
from dataclasses import replace

import pytest
import torch

from linfusion_cli.strips.ops import Strips, StripSize
from linfusion_cli.strips.storage import PLACES, Storage
from linfusion_cli.unet.forward import strip_forward
from tests.support.fakes import GivenControl, Rank, on_ranks
from tests.unet.test_forward import (
    CPU,
    FAMILIES,
    TIMESTEP,
    error,
    plain,
    random_condition,
    skip_shapes,
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


@pytest.mark.parametrize("heights", [(16, 48), (40, 8, 16)])
@pytest.mark.parametrize("place", PLACES)
def test_parts_of_unequal_height_with_maps_anywhere_and_a_controlnet(heights, place):
    with with_linear_attention(FAMILIES["xl"], torch.float64) as unet:
        latents, condition = torch.randn(1, 4, 64, 13, dtype=torch.float64), random_condition(unet)
        shapes = skip_shapes(unet, latents, condition)
        residuals = [torch.randn(shape, dtype=torch.float64) for shape in [*shapes, shapes[-1]]]
        expected = plain(unet, latents, replace(condition, controlnets=[GivenControl(*residuals)]), 2)

        def part(rank: Rank) -> torch.Tensor:
            mine, *found = [rows_of_part(whole, heights, rank.number) for whole in (latents, *residuals)]
            heard = replace(condition, controlnets=[GivenControl(*found)])
            run = Strips(StripSize(3, 20), Storage(place, CPU, torch.float64), rank, 2)
            return strip_forward(copy.deepcopy(unet), run, mine, TIMESTEP, heard)

        found = torch.cat(on_ranks(len(heights), part), dim=2)
    assert error(found, expected) <= 1e-12


def rows_of_part(whole: torch.Tensor, heights: tuple[int, ...], number: int) -> torch.Tensor:
    """The rows that a rank has of a map [B, C, h, w], where `heights` are what all have of 64 rows."""
    return whole.split([height * whole.shape[2] // 64 for height in heights], dim=2)[number]
