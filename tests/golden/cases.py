"""The golden values: the noise of runs, and the final latents of two small runs of the embedded model.

The values are in the two files next to this one, which `python -m tests.golden.record` writes. Record them only after a
deliberate change of the numerics, and document it in the changelog: the same request then gives another image.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from linfusion_cli.core.geometry import Size
from linfusion_cli.run.pipeline import generate
from linfusion_cli.sampling.noise import SequentialNoise, draw_latent_noise, draw_phase_noise, draw_step_noise
from linfusion_cli.settings.request import MAX_SEED
from tests.support.requests import make_request

NOISE_FILE, LATENTS_FILE = (Path(__file__).parent / f"{name}.safetensors" for name in ("noise", "latents"))
STRIDE = 3  # of the recorded rows and columns: complete noise needs ten times the space and shows no more
# At 4 deviations, torch's kernels for AVX2 and for no vectors at all differ by 2e-6 in fp32.
NOISE_TOLERANCE = 1e-5

RUN = {
    "prompt": "a sunset at the sea, clouds",
    "model": "demo",
    "seed": 7,
    "size": Size(256, 192),
    "base_size": Size(128, 96),
    "steps": (8,),
    "strength": (0.45,),  # 3.6 steps, rounded up to 4
    "guidance_scale": (4.0,),
    "attention": ("original", "linear"),
    "vae_statistics": "exact",
    "device": "cpu",
}
RUNS = {
    "demofusion": {"upscaler": "demofusion"},
    "sdedit": {"upscaler": "sdedit", "scheduler": "euler-a", "vae_latents": "sample"},
}
# For latents with a standard deviation of 0.7. Measured: no difference between 1 and 2 threads, and at most 1.3e-5
# between ATEN_CPU_CAPABILITY=default, avx2 and avx512, or with oneDNN and MKL limited to AVX2 or SSE 4.
LATENTS_TOLERANCE = 3e-4


def draw_noises() -> dict[str, Tensor]:
    """Return every kind of noise by name, in fp32; the sizes cover several blocks in both directions."""
    size = (4, 70, 70)
    noises = {
        "phase": draw_phase_noise(7, 1, *size),
        "phase, largest seed": draw_phase_noise(MAX_SEED, 4, *size),
        "latents": draw_latent_noise(7, 1, *size),
        "step": draw_step_noise(7, 1, *size, 3),
        "base": draw_second(SequentialNoise(7, 4, 24, 40, torch.float32)),
    }
    return {name: noise[..., ::STRIDE, ::STRIDE].contiguous() for name, noise in noises.items()}


def draw_second(draw: SequentialNoise) -> Tensor:
    """Return the second noise of a base phase, which also depends on the number of values drawn for the first."""
    draw()
    return draw()


def compute_final_latents(name: str) -> Tensor:
    """Execute the run `name` and return its final latents [1, 4, 24, 32]."""
    with tempfile.TemporaryDirectory() as folder:
        output, latents_file = Path(folder, "a.png"), Path(folder, "a.safetensors")
        generate(make_request(**RUN | RUNS[name], output=output, keep_latents=latents_file), {})
        return load_file(latents_file)["latents"].clone()


def max_difference(computed: Tensor, recorded: Tensor) -> float:
    """Return the largest absolute difference; infinity if the shapes differ or a value is not finite."""
    if computed.shape != recorded.shape or not bool(computed.isfinite().all()):
        return float("inf")
    return float((computed - recorded).abs().max())
