"""Generate sample images with the shipped model, for visual inspection."""

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import nn

from linfusion_cli.mixers.linear.mount import mount_modules
from linfusion_cli.mixers.linear.weights import load_weights
from tools.demo_model.store import MODEL, ROOT, log

SIDE_PX = 256
PRESET = tomllib.loads((ROOT / "presets/demo.toml").read_text(encoding="utf-8"))
PROMPTS = (
    "a starry night over mountains with a moon",
    "a sunset over the sea with a sun, clouds",
    "green hills with a blue sky and fluffy clouds",
    "a green aurora over a snowy lake at night",
    "a golden dawn over hills with the sun",
    "snow-capped mountains on a clear day",
    "a pine forest at sunrise, mist",
    "a full moon over the sea with stars",
    "a red sunset over mountains",
    "a desert at noon, the sun",
    "the milky way over a forest at night",
    "a lake between mountains at dawn",
    "storm clouds over the ocean at sunset",
    "a snowy plain at night, northern lights",
    "a meadow on a summer day, trees",
    "a purple evening over hills, a crescent moon",
)


def load_shipped_model() -> tuple[StableDiffusionXLPipeline, dict[str, nn.Module]]:
    """Load the shipped model in fp32 with its own attention, and the linear modules to mount."""
    pipe = StableDiffusionXLPipeline.from_pretrained(MODEL, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, load_weights(MODEL / "linfusion", pipe.unet, torch.float32)


@torch.no_grad()
def generate_images(
    pipe: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    linear: Mapping[str, nn.Module] | None,
    steps: int = PRESET["steps"],
    guidance: float = PRESET["guidance_scale"],
) -> np.ndarray:
    """Generate one image per prompt and seed, [n, 256, 256, 3] uint8, with linear or (None) original attention."""
    with mount_modules(pipe.unet, linear) if linear else nullcontext():
        images = pipe(
            list(prompts),
            height=SIDE_PX,
            width=SIDE_PX,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
    return (images * 255 + 0.5).astype(np.uint8)


def save_grid(path: Path, images: np.ndarray) -> None:
    """Write images [n, H, W, 3] uint8 as a square grid; omit those that do not fill it."""
    side = int(len(images) ** 0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [np.concatenate(row, axis=1) for row in np.split(images[: side * side], side)]
    Image.fromarray(np.concatenate(rows)).save(path)
    log.info("sample: %s", path)


def sample_grids(folder: Path) -> None:
    """Write a grid of all prompts with linear attention and one with the original."""
    pipe, linear = load_shipped_model()
    for name, modules in {"linear": linear, "original": None}.items():
        save_grid(folder / f"{name}.png", generate_images(pipe, PROMPTS, range(len(PROMPTS)), modules))
