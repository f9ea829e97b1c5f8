"""Stage `latents`: every scene through the VAE's encoder once, and batches of them with SDXL's size conditioning."""

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
from tools.demo_model.train.draw import captions, shards
from tools.demo_model.train.text import tokenize
from tools.demo_model.train.vae import as_input, load_vae

ASPECTS = ("wide2", "wide", "tall2", "tall")
# pictures in a batch: whole scenes, the same at half size, other aspects, two and four times larger, crops of the last
COUNTS = {"square": 8, "half": 32, "aspect": 7, "double": 2, "quadruple": 1, "detail": 8}
GROUP_OF = {"square": "square", "half": "half", "double": "double", "quadruple": "large"}
ENCODED = (*GROUP_OF.values(), *ASPECTS)
NATIVE = 32  # the side of a native picture, in latents


def encode_all(processes: int) -> None:
    """Encode what is missing; one file a group."""
    with get_context("spawn").Pool(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for name in ENCODED:
            if not _path(name).exists():
                log.info("latents: %s", name)
                parts = pool.map(_encode_shard, [(name, i) for i in range(len(_source(name)))], chunksize=1)
                save_tensors(_path(name), {"latents": torch.cat(parts)})


def _path(name: str) -> Path:
    return WORK / "latents" / f"{name}.safetensors"


def _source(name: str) -> list[np.ndarray]:
    return shards("square" if name == "half" else name)


@torch.no_grad()
def _encode_shard(job: tuple[str, int]) -> Tensor:
    """[n, 4, h, w] in fp16, unit deviation."""
    name, index = job
    vae, shard = _vae(), _source(name)[index]
    images = as_input(_halved(shard) if name == "half" else shard)
    batches = images.split(1)  # larger ones leave the cache: a quarter slower
    return torch.cat([vae.encode(x).latent_dist.mean * vae.config.scaling_factor for x in batches]).half()


@cache
def _vae() -> AutoencoderKL:
    return load_vae().to(memory_format=torch.channels_last)


def _halved(images: np.ndarray) -> np.ndarray:
    """[n, H, W, 3] -> [n, H/2, W/2, 3]."""
    count, height, width, _ = images.shape
    squares = images.reshape(count, height // 2, 2, width // 2, 2, 3)
    return squares.mean(axis=(2, 4), dtype=np.float32).round().astype(np.uint8)


@dataclass(frozen=True)
class Batch:
    """`latents` [B, 4, h, w], `tokens` [B, T], `time_ids` [B, 6]: original size, crop corner, target size."""

    latents: Tensor
    tokens: Tensor
    time_ids: Tensor


def encoded(tokenizer: CLIPTokenizer) -> dict[str, tuple[Tensor, Tensor]]:
    """Group -> latents [n, 4, h, w] and tokens [n, T] of all that was encoded."""
    tokens = {name: tokenize(tokenizer, captions(name)) for name in ENCODED if name != "half"}
    tokens["half"] = tokens["square"]
    return {name: (load_tensors(_path(name))["latents"], tokens[name]) for name in ENCODED}


class Latents:
    """Random batches of one shape each, of `groups` as `encoded` gives them."""

    def __init__(self, groups: dict[str, tuple[Tensor, Tensor]], seed: int, rank: int):
        self.rng = np.random.default_rng((seed, rank))
        self.kinds = np.random.default_rng(seed)  # the same in every process: none waits for a costlier batch
        self.groups = groups

    def next(self, shares: dict[str, float]) -> Batch:
        """A batch of a kind drawn by its share."""
        kind = str(self.kinds.choice(list(shares), p=list(shares.values())))
        if kind == "detail":
            return self._detail(COUNTS[kind])
        name = str(self.rng.choice(ASPECTS)) if kind == "aspect" else GROUP_OF[kind]
        latents, tokens = self._pick(name, COUNTS[kind])
        return Batch(latents, tokens, _coarse(latents) if kind == "half" else self._whole_view(latents))

    def _pick(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        latents, tokens = self.groups[name]
        pick = torch.from_numpy(self.rng.integers(0, len(latents), count))
        return latents[pick].float(), tokens[pick]

    def _whole_view(self, latents: Tensor) -> Tensor:
        """The size is that of the finished picture, which may be far larger than this one; nothing is cropped."""
        count, _, height, width = latents.shape
        area = np.exp(self.rng.uniform(np.log(256), np.log(16384), count))
        ratio = (height / width) ** 0.5
        size = np.stack([area * ratio, area / ratio], axis=1).clip(64, 32768)
        ids = np.concatenate([size, np.zeros_like(size), size], axis=1)
        return torch.from_numpy(ids.round()).float()

    def _detail(self, count: int) -> Batch:
        """Native crops of the largest drawings; size and corner are told, as SDXL means it."""
        whole, tokens = self._pick("large", count)
        side = whole.shape[-1]
        corner = self.rng.integers(0, side - NATIVE + 1, (count, 2))
        crops = [image[:, y : y + NATIVE, x : x + NATIVE] for image, (y, x) in zip(whole, corner, strict=True)]
        original, target = (torch.full((count, 2), 8.0 * n) for n in (side, NATIVE))
        ids = torch.cat([original, 8.0 * torch.from_numpy(corner), target], dim=1)
        return Batch(torch.stack(crops), tokens, ids.float())


def _coarse(latents: Tensor) -> Tensor:
    """A picture that was small to begin with: its size is its own."""
    size = 8.0 * torch.tensor(latents.shape[2:])
    return torch.cat([size, torch.zeros(2), size]).expand(len(latents), 6)
