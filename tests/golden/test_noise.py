"""The noise of a seed never changes: the same request must give the same image in the next release."""

import hashlib
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from linfusion_cli.images.process.quantise import quantise
from linfusion_cli.sampling.noise import draw_latent_noise, draw_phase_noise, draw_step_noise
from tests.golden.cases import NOISE_FILE, NOISE_TOLERANCE, draw_noises, max_difference

# Dithering uses integers and single IEEE 754 operations only: the result is the same on every machine.
DITHERED_SHA256 = {
    8: "5a39e8eb66f2998b1ee8ea51bf68584c0d9d13fc98374583798fc9394ff97cde",
    16: "2daad662a31fedcb916007410e73f37e91025f2437769a42265e9b2e45485fb0",
}

# On CPUs without vector instructions, torch draws fp32 noise with other kernels, which differ in the last bits.
VECTORS = {
    "phase": "30f387ee5fb1b793f227a31db75d356a3976951022268d7280d8a85ae2db4456",
    "latents": "64bed03817e4642a7924b794f7abdb8d86bbf0694092323b7b3a9ac8eb87a167",
    "step": "06f48084f3b6fc6498b3ee812c05c4817a26a8d86d425dd98ce06de2bf882d71",
}
NO_VECTORS = {
    "phase": "327cf345c0b50026b937781e8bbfca67a50b9dc649d0ca7c355b45f60e41a696",
    "latents": "97c339686e45b663a1516b49a3a629a5669ccfa9b4e09477967ad1c5b9abc1d1",
    "step": "abb96c0946792fcaf7d3e711896d09e530c6213a9a5aadbd51ed2d1a5d869e1c",
}
NOISE_SHA256 = {"AVX512": VECTORS, "AVX2": VECTORS, "DEFAULT": NO_VECTORS}
CAPABILITY = torch.backends.cpu.get_cpu_capability()
SIZE = (4, 70, 70)
DRAWN = {
    "phase": partial(draw_phase_noise, 7, 1, *SIZE),
    "latents": partial(draw_latent_noise, 7, 1, *SIZE),
    "step": partial(draw_step_noise, 7, 1, *SIZE, 3),
}


@pytest.mark.skipif(CAPABILITY not in NOISE_SHA256, reason=f"no hashes recorded for a CPU with {CAPABILITY}")
@pytest.mark.parametrize("name", DRAWN)
def test_noise_equals_the_recorded_bits(name):
    noise = DRAWN[name]().numpy().astype("<f4")
    assert hashlib.sha256(noise.tobytes()).hexdigest() == NOISE_SHA256[CAPABILITY][name]


def test_noise_of_runs_equals_the_recorded_values():
    noises, recorded = draw_noises(), load_file(NOISE_FILE)
    assert noises.keys() == recorded.keys()
    differences = {name: max_difference(noises[name], recorded[name]) for name in noises}
    assert max(differences.values()) <= NOISE_TOLERANCE, differences


@pytest.mark.parametrize("bits", DITHERED_SHA256)
def test_dithered_values_equal_the_recorded_ones(bits):
    rows = (np.arange(40 * 33 * 3, dtype=np.float32) / np.float32(40 * 33 * 3 - 1)).reshape(40, 33, 3)
    values = quantise(rows, 1000, bits, seed=7).astype(f"<u{bits // 8}")
    assert hashlib.sha256(values.tobytes()).hexdigest() == DITHERED_SHA256[bits]
