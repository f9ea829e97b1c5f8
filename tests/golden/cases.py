"""What is pinned: the noise that runs draw, and the final latents of two small runs of the embedded model.

The values are in the two files beside this one, which `python -m tests.golden.record` writes anew. Do that only for a
deliberate change of the numerics, and say so in the changelog: the same request makes another image from then on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from linfusion_cli.core.geometry import Size
from linfusion_cli.run.pipeline import generate
from linfusion_cli.sampling.noise import SequentialNoise, latent_noise, phase_noise, step_noise
from linfusion_cli.settings.request import MAX_SEED, GenerateRequest

NOISE_FILE, LATENTS_FILE = (Path(__file__).parent / f"{name}.safetensors" for name in ("noise", "latents"))
EVERY = 3  # of a noise's rows and columns are kept: whole, it would be ten times the size, and show no more
# At 4 deviations, torch's kernels for AVX2 and for no vectors at all differ by 2e-6 in fp32.
NOISE_TOLERANCE = 1e-5

RUN = {
    "prompt": "a sunset at the sea, clouds",
    "model": "demo",
    "seed": 7,
    "size": Size(256, 192),
    "base_size": Size(128, 96),
    "steps": (8,),
    "strength": (0.45,),  # 3.6 of the steps, of which 4 are run
    "guidance_scale": (4.0,),
    "attention": ("original", "linear"),
    "vae_statistics": "exact",
    "device": "cpu",
}
RUNS = {
    "demofusion": {"upscaler": "demofusion"},
    "sdedit": {"upscaler": "sdedit", "scheduler": "euler-a", "vae_latents": "sample"},
}
# Of latents with a deviation of 0.7. Measured: no difference between 1 and 2 threads, and 1.3e-5 at most between
# ATEN_CPU_CAPABILITY=default, avx2 and avx512, or with oneDNN and MKL limited to AVX2 or SSE 4.
LATENTS_TOLERANCE = 3e-4


def noises() -> dict[str, Tensor]:
    """Every kind of noise by name, in fp32; those of phases cross the borders between blocks in both directions."""
    size = (4, 70, 70)
    drawn = {
        "phase": phase_noise(7, 1, *size),
        "phase, largest seed": phase_noise(MAX_SEED, 4, *size),
        "latents": latent_noise(7, 1, *size),
        "step": step_noise(7, 1, *size, 3),
        "base": second_of(SequentialNoise(7, 4, 24, 40, torch.float32)),
    }
    return {name: noise[..., ::EVERY, ::EVERY].contiguous() for name, noise in drawn.items()}


def second_of(draw: SequentialNoise) -> Tensor:
    """The second noise of a base, which also tells whether the first took as many numbers as it should."""
    draw()
    return draw()


def final_latents(name: str) -> Tensor:
    """The latents [1, 4, 24, 32] that the run `name` ends with, made now."""
    with tempfile.TemporaryDirectory() as folder:
        output, kept = Path(folder, "a.png"), Path(folder, "a.safetensors")
        generate(GenerateRequest(**RUN | RUNS[name], output=output, keep_latents=kept), {})
        return load_file(kept)["latents"].clone()


def largest_difference(found: Tensor, recorded: Tensor) -> float:
    """Infinite where shapes differ or anything is not finite."""
    if found.shape != recorded.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - recorded).abs().max())
