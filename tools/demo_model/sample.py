"""Pictures from the model as it will be used, to be judged by eye."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from linfusion_cli.attention.mount import mounted
from tools.demo_model.distill import load_linear
from tools.demo_model.export import assemble
from tools.demo_model.store import log

PROMPTS = (
    "a starry night over mountains with a moon",
    "a starry night over mountains with a moon and an aurora",
    "a green aurora over a snowy lake at night",
    "sunset at the sea, clouds",
    "an orange sunset over the ocean with the sun",
    "snow-capped mountains on a clear day",
    "a lake between mountains at dawn, mist",
    "a pine forest in the morning",
    "green hills with a blue sky and fluffy clouds",
    "a desert at noon, the sun",
    "the milky way over a forest at night",
    "a red sunset over mountains",
    "a full moon over the sea with stars",
    "a snowy plain at night, northern lights",
    "a meadow on a summer day",
    "storm clouds over the ocean",
)


@torch.no_grad()
def sample_grid(
    path: Path,
    final: bool = True,
    linear: bool = True,
    steps: int = 24,
    guidance: float = 4.0,
    size: tuple[int, int] = (256, 256),
    prompts: tuple[str, ...] = PROMPTS,
) -> None:
    """A grid of all prompts, drawn with linear attention or with the original; `size` is height and width."""
    pipe = assemble(final)
    pipe.set_progress_bar_config(disable=True)
    modules = load_linear(pipe.unet)
    with mounted(pipe.unet, modules) if linear else nullcontext():
        images = _images(pipe, prompts, steps, guidance, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = max(int(len(images) ** 0.5), 1)
    rows = [np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images) - columns + 1, columns)]
    Image.fromarray(np.concatenate(rows)).save(path)
    log.info("sample: %s", path)


def _images(
    pipe: StableDiffusionXLPipeline, prompts: tuple[str, ...], steps: int, guidance: float, size: tuple[int, int]
) -> list[np.ndarray]:
    drawn = pipe(
        list(prompts),
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        output_type="np",
    ).images
    return [(image * 255 + 0.5).astype(np.uint8) for image in drawn]
