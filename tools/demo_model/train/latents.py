"""Stage `latents`: encode all scenes once; draw batches of latents with SDXL's size conditioning."""

from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from tools.demo_model.store import WORK, load_tensors, log, save_tensors
from tools.demo_model.train.draw import load_captions, load_shards
from tools.demo_model.train.text import tokenize
from tools.demo_model.train.vae import load_vae, to_input

ASPECTS = ("wide2", "wide", "tall2", "tall")
# batch sizes: complete scenes, at half size, other aspect ratios, 2 and 4 times larger, crops of the largest
COUNTS = {"square": 8, "half": 32, "aspect": 7, "double": 2, "quadruple": 1, "detail": 8}
GROUP_OF = {"square": "square", "half": "half", "double": "double", "quadruple": "large"}
ENCODED = (*GROUP_OF.values(), *ASPECTS)
NATIVE = 32  # side of a native image, in latents


def encode_all(processes: int) -> None:
    """Encode all missing groups, one file each."""
    with get_context("spawn").Pool(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for name in ENCODED:
            if not _path(name).exists():
                log.info("latents: %s", name)
                parts = pool.map(_encode_shard, [(name, i) for i in range(len(_source(name)))], chunksize=1)
                save_tensors(_path(name), {"latents": torch.cat(parts)})


def _path(name: str) -> Path:
    return WORK / "latents" / f"{name}.safetensors"


def _source(name: str) -> list[np.ndarray]:
    return load_shards("square" if name == "half" else name)


@torch.no_grad()
def _encode_shard(job: tuple[str, int]) -> Tensor:
    """Encode one shard to fp16 latents [n, 4, h, w] with unit standard deviation."""
    name, index = job
    vae, shard = _vae(), _source(name)[index]
    images = to_input(_halve(shard) if name == "half" else shard)
    batches = images.split(1)  # larger batches do not fit in the CPU cache: 25 % slower
    return torch.cat([vae.encode(x).latent_dist.mean * vae.config.scaling_factor for x in batches]).half()


@cache
def _vae() -> AutoencoderKL:
    return load_vae().to(memory_format=torch.channels_last)


def _halve(images: np.ndarray) -> np.ndarray:
    """Reduce [n, H, W, 3] to [n, H/2, W/2, 3]."""
    count, height, width, _ = images.shape
    squares = images.reshape(count, height // 2, 2, width // 2, 2, 3)
    return squares.mean(axis=(2, 4), dtype=np.float32).round().astype(np.uint8)


@dataclass(frozen=True)
class Batch:
    """`latents` [B, 4, h, w], `tokens` [B, T], `time_ids` [B, 6]: original size, crop corner, target size."""

    latents: Tensor
    tokens: Tensor
    time_ids: Tensor


def load_groups(tokenizer: CLIPTokenizer) -> dict[str, tuple[Tensor, Tensor]]:
    """Load the latents [n, 4, h, w] and tokens [n, T] of all groups."""
    tokens = {name: tokenize(tokenizer, load_captions(name)) for name in ENCODED if name != "half"}
    tokens["half"] = tokens["square"]
    return {name: (load_tensors(_path(name))["latents"], tokens[name]) for name in ENCODED}


class Latents:
    """Draw random batches from `groups` (see `load_groups`); all latents in a batch have the same shape."""

    def __init__(self, groups: dict[str, tuple[Tensor, Tensor]], seed: int, rank: int):
        self.rng = np.random.default_rng((seed, rank))
        self.kinds = np.random.default_rng(seed)  # same seed in all processes: all get batches of equal cost
        self.groups = groups

    def next(self, shares: dict[str, float]) -> Batch:
        """Draw a batch of a random kind with probabilities `shares`."""
        kind = str(self.kinds.choice(list(shares), p=list(shares.values())))
        if kind == "detail":
            return self._draw_detail_batch(COUNTS[kind])
        name = str(self.rng.choice(ASPECTS)) if kind == "aspect" else GROUP_OF[kind]
        latents, tokens = self._pick(name, COUNTS[kind])
        return Batch(latents, tokens, _build_coarse_ids(latents) if kind == "half" else self._draw_size_ids(latents))

    def _pick(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        latents, tokens = self.groups[name]
        pick = torch.from_numpy(self.rng.integers(0, len(latents), count))
        return latents[pick].float(), tokens[pick]

    def _draw_size_ids(self, latents: Tensor) -> Tensor:
        """Draw the size of the final image, which can be much larger than this one; without crop."""
        count, _, height, width = latents.shape
        area = np.exp(self.rng.uniform(np.log(256), np.log(16384), count))
        ratio = (height / width) ** 0.5
        size = np.stack([area * ratio, area / ratio], axis=1).clip(64, 32768)
        ids = np.concatenate([size, np.zeros_like(size), size], axis=1)
        return torch.from_numpy(ids.round()).float()

    def _draw_detail_batch(self, count: int) -> Batch:
        """Draw native-size crops of the largest images, with SDXL's conditioning on original size and crop corner."""
        whole, tokens = self._pick("large", count)
        side = whole.shape[-1]
        corner = self.rng.integers(0, side - NATIVE + 1, (count, 2))
        crops = [image[:, y : y + NATIVE, x : x + NATIVE] for image, (y, x) in zip(whole, corner, strict=True)]
        original, target = (torch.full((count, 2), 8.0 * n) for n in (side, NATIVE))
        ids = torch.cat([original, 8.0 * torch.from_numpy(corner), target], dim=1)
        return Batch(torch.stack(crops), tokens, ids.float())


def _build_coarse_ids(latents: Tensor) -> Tensor:
    """Build the size conditioning of images that were originally small: original and target size are their own."""
    size = 8.0 * torch.tensor(latents.shape[2:])
    return torch.cat([size, torch.zeros(2), size]).expand(len(latents), 6)
