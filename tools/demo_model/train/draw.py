"""Stage `scenes`: draw all training images once, in shards and in parallel."""

import json
import os
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from tools.demo_model.scenes.scene import draw_scene
from tools.demo_model.store import WORK, log, save_array, save_json

SHARD_SCENES = 80
# name -> (first scene number, count, (height, width) in pixels); sides are multiples of 64
GROUPS = {
    "square": (0, 9600, (256, 256)),
    "wide2": (20000, 160, (192, 384)),
    "wide": (21000, 160, (192, 320)),
    "tall2": (22000, 160, (384, 192)),
    "tall": (23000, 160, (320, 192)),
    "held_out": (30000, 400, (256, 256)),
    "held_out_2": (31000, 64, (512, 512)),
    "held_out_4": (32000, 32, (1024, 1024)),
    "large": (40000, 480, (1024, 1024)),
    "double": (50000, 960, (512, 512)),
}


def draw_all(processes: int = 2) -> None:
    """Draw all missing shards."""
    jobs = [(name, shard) for name, (_, count, _) in GROUPS.items() for shard in range(-(-count // SHARD_SCENES))]
    jobs = [job for job in jobs if not _path(*job).exists()]
    log.info("scenes: %d shards to draw", len(jobs))
    os.environ["OMP_NUM_THREADS"] = "1"
    with get_context("spawn").Pool(processes) as pool:
        for done, _ in enumerate(pool.imap_unordered(_draw_shard, jobs)):
            if done % 20 == 0:
                log.info("scenes: %d of %d shards", done + 1, len(jobs))


def _path(name: str, shard: int) -> Path:
    return WORK / "scenes" / f"{name}-{shard:03d}.npy"


def _draw_shard(job: tuple[str, int]) -> None:
    name, shard = job
    first, count, shape = GROUPS[name]
    numbers = range(first + shard * SHARD_SCENES, first + min((shard + 1) * SHARD_SCENES, count))
    scenes = [draw_scene(number, shape) for number in numbers]
    save_json(_path(name, shard).with_suffix(".json"), [words for _, words in scenes])
    save_array(_path(name, shard), np.stack([image for image, _ in scenes]))


def load_shards(name: str) -> list[np.ndarray]:
    """Memory-map the images of a group, shards of [n, H, W, 3] uint8."""
    return [np.load(path, mmap_mode="r") for path in sorted((WORK / "scenes").glob(f"{name}-*.npy"))]


def load_captions(name: str) -> list[str]:
    """Load the captions of a group, in the order of its images."""
    paths = sorted((WORK / "scenes").glob(f"{name}-*.json"))
    return [words for path in paths for words in json.loads(path.read_text(encoding="utf-8"))]
