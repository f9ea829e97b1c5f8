"""The final latents of a run of the embedded model equal the recorded ones, up to rounding."""

import pytest
from safetensors.torch import load_file

from tests.golden.cases import LATENTS_FILE, LATENTS_TOLERANCE, RUNS, compute_final_latents, max_difference


@pytest.mark.parametrize("name", RUNS)
def test_final_latents_equal_the_recorded_ones(name):
    difference = max_difference(compute_final_latents(name), load_file(LATENTS_FILE)[name])
    assert difference <= LATENTS_TOLERANCE, f"the difference is {difference:.1e}"
