"""Several devices, each with a part of the rows, predict the same as a single device."""

import copy
from dataclasses import replace

import pytest
import torch

from linfusion_cli.strips.ops import StripContext, StripSize
from linfusion_cli.strips.storage import PLACES, Storage
from linfusion_cli.unet.forward import strip_forward
from tests.support.fakes import ConstantControlNet, Rank, run_on_ranks
from tests.unet.test_forward import (
    CPU,
    FAMILIES,
    TIMESTEP,
    random_condition,
    relative_error,
    run_plain,
    skip_shapes,
    with_linear_attention,
)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("family", ["xl", "sd15"])
def test_parts_of_the_rows_give_the_result_of_all_rows(family, count, dilation):
    with with_linear_attention(FAMILIES[family], torch.float64) as unet:
        latents, condition = torch.randn(1, 4, 64, 20, dtype=torch.float64), random_condition(unet)
        expected = run_plain(unet, latents, condition, dilation)

        def run_part(rank: Rank) -> torch.Tensor:
            context = StripContext(StripSize(3, 64), Storage("device", CPU, torch.float64), rank, dilation)
            rows = latents.chunk(count, dim=2)[rank.number]
            return strip_forward(copy.deepcopy(unet), context, rows, TIMESTEP, condition)

        result = torch.cat(run_on_ranks(count, run_part), dim=2)
    assert relative_error(result, expected) <= 1e-12


@pytest.mark.parametrize("heights", [(16, 48), (40, 8, 16)])
@pytest.mark.parametrize("place", PLACES)
def test_parts_of_unequal_height_with_every_storage_and_a_controlnet(heights, place):
    with with_linear_attention(FAMILIES["xl"], torch.float64) as unet:
        latents, condition = torch.randn(1, 4, 64, 13, dtype=torch.float64), random_condition(unet)
        shapes = skip_shapes(unet, latents, condition)
        residuals = [torch.randn(shape, dtype=torch.float64) for shape in [*shapes, shapes[-1]]]
        expected = run_plain(unet, latents, replace(condition, controlnets=[ConstantControlNet(*residuals)]), 2)

        def run_part(rank: Rank) -> torch.Tensor:
            part_latents, *part_residuals = [
                select_part(whole, heights, rank.number) for whole in (latents, *residuals)
            ]
            part_condition = replace(condition, controlnets=[ConstantControlNet(*part_residuals)])
            context = StripContext(StripSize(3, 20), Storage(place, CPU, torch.float64), rank, 2)
            return strip_forward(copy.deepcopy(unet), context, part_latents, TIMESTEP, part_condition)

        result = torch.cat(run_on_ranks(len(heights), run_part), dim=2)
    assert relative_error(result, expected) <= 1e-12


def select_part(whole: torch.Tensor, heights: tuple[int, ...], number: int) -> torch.Tensor:
    """Return the rows of a rank from a map [B, C, h, w], given the `heights` of all ranks out of 64 rows."""
    return whole.split([height * whole.shape[2] // 64 for height in heights], dim=2)[number]
