"""The model as it is shipped, for measuring it: the folder's half precision weights, in fp32."""

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from linfusion_cli.attention.mount import mounted
from linfusion_cli.attention.weights import load_weights
from tools.demo_model.store import MODEL, ROOT

SIDE_PX = 256
PRESET = tomllib.loads((ROOT / "linfusion_cli/presets/demo.toml").read_text(encoding="utf-8"))


def load_shipped() -> tuple[StableDiffusionXLPipeline, dict[str, nn.Module]]:
    """The pipeline with its own attention, and the linear modules to mount."""
    pipe = StableDiffusionXLPipeline.from_pretrained(MODEL, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, load_weights(MODEL / "linfusion", pipe.unet, torch.float32)


@torch.no_grad()
def paint(
    pipe: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    linear: Mapping[str, nn.Module] | None,
    steps: int = PRESET["steps"],
    guidance: float = PRESET["guidance_scale"],
) -> np.ndarray:
    """One picture a prompt with its seed, [n, 256, 256, 3] uint8, with linear attention or (None) with the original."""
    with mounted(pipe.unet, linear) if linear else nullcontext():
        drawn = pipe(
            list(prompts),
            height=SIDE_PX,
            width=SIDE_PX,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
    return (drawn * 255 + 0.5).astype(np.uint8)
