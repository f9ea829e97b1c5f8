"""The noise of a seed stays what it was, or the same request would make another image in the next release."""

import hashlib

import numpy as np
import pytest
from safetensors.torch import load_file

from linfusion_cli.images.quantise import quantised
from tests.golden.cases import NOISE_FILE, NOISE_TOLERANCE, largest_difference, noises

# Integers and single operations of IEEE 754 only, so these are the same on every machine.
DITHERED_SHA256 = {
    8: "5a39e8eb66f2998b1ee8ea51bf68584c0d9d13fc98374583798fc9394ff97cde",
    16: "2daad662a31fedcb916007410e73f37e91025f2437769a42265e9b2e45485fb0",
}


def test_the_noise_of_runs_is_that_recorded():
    found, recorded = noises(), load_file(NOISE_FILE)
    assert found.keys() == recorded.keys()
    differences = {name: largest_difference(found[name], recorded[name]) for name in found}
    assert max(differences.values()) <= NOISE_TOLERANCE, differences


@pytest.mark.parametrize("bits", DITHERED_SHA256)
def test_dithered_numbers_are_those_recorded(bits):
    rows = (np.arange(40 * 33 * 3, dtype=np.float32) / np.float32(40 * 33 * 3 - 1)).reshape(40, 33, 3)
    found = quantised(rows, 1000, bits, seed=7).astype(f"<u{bits // 8}")
    assert hashlib.sha256(found.tobytes()).hexdigest() == DITHERED_SHA256[bits]
