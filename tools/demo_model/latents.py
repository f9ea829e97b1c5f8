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

from tools.demo_model.draw import GROUPS, SHARD, captions, shards
from tools.demo_model.store import WORK, load_tensors, log, save_tensors
from tools.demo_model.text import tokenize
from tools.demo_model.vae import as_input, load_vae

ASPECTS = ("wide2", "wide", "tall2", "tall")
LARGE = GROUPS["large"][2][0]
TILE = 512
# pictures in a batch: whole scenes, the same at half size, other aspects, crops of large drawings, double size
COUNTS = {"square": 8, "half": 32, "aspect": 7, "detail": 8, "double": 2}
ENCODED = ("square", "half", *ASPECTS, "view", "detail")


def encode_all(processes: int) -> None:
    """Encode what is missing; one file a group."""
    with get_context("spawn").Pool(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for name in ENCODED:
            if not _path(name).exists():
                log.info("latents: %s", name)
                parts = pool.map(_encode_shard, [(name, i) for i in range(len(_source(name)))], chunksize=1)
                save_tensors(_path(name), {key: torch.cat([part[key] for part in parts]) for key in parts[0]})


def _path(name: str) -> Path:
    return WORK / "latents" / f"{name}.safetensors"


def _source(name: str) -> list[np.ndarray]:
    if name in ("view", "detail"):
        return shards("large")[::2] if name == "view" else shards("large")[1::2]
    return shards("square" if name == "half" else name)


@torch.no_grad()
def _encode_shard(job: tuple[str, int]) -> dict[str, Tensor]:
    """`latents` [n, 4, h, w] in fp16, unit deviation; `corner` [n, 2]: y and x of the crop, in pixels."""
    name, index = job
    vae = _vae()
    pixels, corner = _pictures(name, _source(name)[index], np.random.default_rng(index))
    batches = as_input(pixels).split(1)  # larger ones leave the cache: a quarter slower
    latents = torch.cat([vae.encode(x).latent_dist.mean * vae.config.scaling_factor for x in batches])
    return {"latents": latents.half(), "corner": torch.from_numpy(corner)}


@cache
def _vae() -> AutoencoderKL:
    return load_vae().to(memory_format=torch.channels_last)


def _pictures(name: str, shard: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What the group is of the drawings, [n, H, W, 3], and the corners of the crops."""
    corner = np.zeros((len(shard), 2), np.int64)
    if name in ("view", "half"):
        count, height, width, _ = shard.shape
        halves = shard.reshape(count, height // 2, 2, width // 2, 2, 3)
        return halves.mean(axis=(2, 4), dtype=np.float32).round().astype(np.uint8), corner
    if name == "detail":
        corner = rng.integers(0, (LARGE - TILE) // 8 + 1, corner.shape) * 8
        return np.stack([i[y : y + TILE, x : x + TILE] for i, (y, x) in zip(shard, corner, strict=True)]), corner
    return shard, corner


@dataclass(frozen=True)
class Batch:
    """`latents` [B, 4, h, w], `tokens` [B, T], `time_ids` [B, 6]: original size, crop corner, target size."""

    latents: Tensor
    tokens: Tensor
    time_ids: Tensor


class Latents:
    """Random batches of one shape each."""

    def __init__(self, tokenizer: CLIPTokenizer, seed: int, rank: int):
        self.rng = np.random.default_rng((seed, rank))
        self.kinds = np.random.default_rng(seed)  # the same in every process: none waits for a costlier batch
        self.groups = {name: load_tensors(_path(name)) for name in ENCODED}
        large = tokenize(tokenizer, captions("large")).unflatten(0, (-1, SHARD))
        self.tokens = {name: tokenize(tokenizer, captions(name)) for name in ("square", *ASPECTS)}
        self.tokens["half"] = self.tokens["square"]
        self.tokens |= {"view": large[::2].flatten(0, 1), "detail": large[1::2].flatten(0, 1)}

    def next(self, shares: dict[str, float]) -> Batch:
        """A batch of a kind drawn by its share."""
        kind = str(self.kinds.choice(list(shares), p=list(shares.values())))
        count = COUNTS[kind]
        if kind == "detail" or (kind == "double" and self.rng.random() < 0.5):
            return self._detail(count, 32 if kind == "detail" else 64)
        name = {"double": "view", "aspect": str(self.rng.choice(ASPECTS))}.get(kind, kind)
        latents, pick = self._pick(name, count)
        ids = _coarse(latents) if kind == "half" else self._whole_view(latents)
        return Batch(latents, self.tokens[name][pick], ids)

    def _pick(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        latents = self.groups[name]["latents"]
        pick = torch.from_numpy(self.rng.integers(0, len(latents), count))
        return latents[pick].float(), pick

    def _whole_view(self, latents: Tensor) -> Tensor:
        """The size is that of the finished picture, which may be far larger than this one; nothing is cropped."""
        count, _, height, width = latents.shape
        area = np.exp(self.rng.uniform(np.log(256), np.log(16384), count))
        ratio = (height / width) ** 0.5
        size = np.stack([area * ratio, area / ratio], axis=1).clip(64, 32768)
        ids = np.concatenate([size, np.zeros_like(size), size], axis=1)
        return torch.from_numpy(ids.round()).float()

    def _detail(self, count: int, side: int) -> Batch:
        tiles, pick = self._pick("detail", count)
        corner = self.groups["detail"]["corner"][pick].clone()
        cut = self.rng.integers(0, tiles.shape[-1] - side + 1, (count, 2))
        latents = torch.stack([t[:, y : y + side, x : x + side] for t, (y, x) in zip(tiles, cut, strict=True)])
        corner += 8 * torch.from_numpy(cut)
        original, target = (torch.full((count, 2), float(n)) for n in (LARGE, 8 * side))
        return Batch(latents, self.tokens["detail"][pick], torch.cat([original, corner.float(), target], dim=1))


def _coarse(latents: Tensor) -> Tensor:
    """A picture that was small to begin with: its size is its own."""
    size = 8.0 * torch.tensor(latents.shape[2:])
    return torch.cat([size, torch.zeros(2), size]).expand(len(latents), 6)
