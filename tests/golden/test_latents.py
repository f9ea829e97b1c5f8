"""A whole run of the embedded model ends with the latents that it always ended with, up to rounding."""

import pytest
from safetensors.torch import load_file

from tests.golden.cases import LATENTS_FILE, LATENTS_TOLERANCE, RUNS, final_latents, largest_difference


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_with_the_latents_recorded(name):
    difference = largest_difference(final_latents(name), load_file(LATENTS_FILE)[name])
    assert difference <= LATENTS_TOLERANCE, f"{difference:.1e} apart"
