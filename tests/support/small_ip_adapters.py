"""Small random IP-Adapters in the published layout, and image encoders for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

HIDDEN, PROJECTION, IMAGE_PX, PATCH_PX = 24, 20, 32, 8
TOKENS = {"plain": 4, "plus": 6, "full": (IMAGE_PX // PATCH_PX) ** 2 + 1}
DEPTH, HEAD_WIDTH = 4, 64  # of a Plus adapter; diffusers requires these values
SCALE = 3.0  # of keys and values: large enough that an ignored image fails the comparison


def write_encoder(folder: Path, hidden: int = HIDDEN, projection: int = PROJECTION) -> Path:
    """Write a small CLIP vision model to `folder`."""
    torch.manual_seed(7)
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def write_adapter(file: Path, unet: UNet2DConditionModel, kind: str = "plain", seed: int = 1) -> Path:
    """Write an IP-Adapter of this kind for `unet`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(build_adapter_tensors(unet, kind, seed), file, {"format": "pt"})
    return file


def build_adapter_tensors(unet: UNet2DConditionModel, kind: str, seed: int = 1) -> dict[str, Tensor]:
    """Return name to tensor of an IP-Adapter file."""
    generator = torch.Generator().manual_seed(seed)
    width = unet.config.cross_attention_dim
    shapes = {f"image_proj.{name}": shape for name, shape in PROJECTIONS[kind](width).items()}
    names = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    for i, name in enumerate(names):
        channels = unet.get_submodule(name).to_k.out_features
        shapes |= {f"ip_adapter.{2 * i + 1}.to_{side}_ip.weight": (channels, width) for side in "kv"}
    return {name: draw_tensor(shape, generator, name) for name, shape in shapes.items()}


def draw_tensor(shape: tuple[int, ...], generator: torch.Generator, name: str) -> Tensor:
    """Draw weights that preserve the magnitude of activations, and non-zero biases."""
    size = (SCALE if "_ip" in name else 1.0) / shape[-1] ** 0.5 if len(shape) > 1 else 0.5
    return torch.randn(shape, generator=generator) * size


def list_plain_shapes(width: int) -> dict[str, tuple[int, ...]]:
    return {
        "proj.weight": (4 * width, PROJECTION),
        "proj.bias": (4 * width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }


def list_full_shapes(width: int) -> dict[str, tuple[int, ...]]:
    shapes = {"proj.0": (HIDDEN, HIDDEN), "proj.2": (width, HIDDEN), "proj.3": (width,)}
    return {f"{name}.{part}": shape[: 2 if part == "weight" else 1] for name, shape in shapes.items() for part in PARTS}


def list_plus_shapes(width: int) -> dict[str, tuple[int, ...]]:
    inner = 16
    shapes: dict[str, tuple[int, ...]] = {"latents": (1, TOKENS["plus"], inner)}
    for name, shape in {"proj_in": (inner, HIDDEN), "proj_out": (width, inner), "norm_out": (width,)}.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for i in range(DEPTH):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{i}.{norm}.{part}": (inner,) for part in PARTS}
        shapes |= {
            f"layers.{i}.0.to_q.weight": (HEAD_WIDTH, inner),
            f"layers.{i}.0.to_kv.weight": (2 * HEAD_WIDTH, inner),
            f"layers.{i}.0.to_out.weight": (inner, HEAD_WIDTH),
            f"layers.{i}.1.1.weight": (4 * inner, inner),
            f"layers.{i}.1.3.weight": (inner, 4 * inner),
        }
    return shapes


PARTS = ("weight", "bias")
PROJECTIONS = {"plain": list_plain_shapes, "plus": list_plus_shapes, "full": list_full_shapes}


def write_image(file: Path, seed: int = 3, width: int = 50, height: int = 41) -> Path:
    """Write an image of smooth coloured noise."""
    numbers = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    Image.fromarray(numbers).resize((width, height), Image.Resampling.BICUBIC).save(file)
    return file
