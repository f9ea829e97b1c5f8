"""`python -m tools.demo_model.evaluate.measure [vae] [attention] [prompts]`: the shipped model's figures, beside those asked.

They go to `.work/demo/figures.json`, and the pictures that were judged to `.work/demo/judged/`, to be looked at.
"""

import argparse
import json
import os
from collections.abc import Sequence
from functools import cache
from multiprocessing import get_context
from multiprocessing.pool import Pool

import numpy as np
import torch

from tools.demo_model.evaluate.errors import closed, noise_errors, zeroed
from tools.demo_model.evaluate.obey import VARIETY, Judges, Paint, obedience, variety
from tools.demo_model.evaluate.sample import PRESET, load_shipped, paint, save_grid
from tools.demo_model.store import WORK, log, save_json, start_log
from tools.demo_model.train.distill import load_linear, result_of
from tools.demo_model.train.draw import captions, shards
from tools.demo_model.train.vae import measure

FIGURES = WORK / "figures.json"
BATCH = 16
STAGES = ("vae", "attention", "prompts")
# held-out group -> scenes and timesteps of each
SIZES = {"held_out": (128, 4), "held_out_2": (64, 3), "held_out_4": (32, 3)}


def measure_vae() -> dict[str, float]:
    """PSNR of the VAE and of thumbnails on all held-out scenes, and how far mean colours are off."""
    images = np.concatenate(shards("held_out"))
    return measure(_shipped()[0].vae, images)


def measure_attention(pool: Pool) -> dict[str, dict[str, float]]:
    """Noise errors by size and form of attention."""
    found = {}
    for name, (count, draws) in SIZES.items():
        parts = pool.starmap(_errors, [(name, start, count // 4, draws) for start in range(0, count, count // 4)])
        errors = {form: float(np.mean([part[form] for part in parts])) for form in parts[0]}
        found[name] = errors | {"closed": closed(errors)}
        log.info("attention, %s: %s", name, found[name])
    return found


def _errors(name: str, start: int, count: int, draws: int) -> dict[str, float]:
    pipe, linear = _shipped()
    forms = {"softmax": None, "linear": linear, "zero": zeroed(pipe.unet)}
    for stage in ("distill_linear", "distill_unnormalised"):  # neither is shipped
        if result_of(stage).exists():
            forms[stage] = load_linear(pipe.unet, stage)
    images, words = np.concatenate(shards(name)), captions(name)
    return noise_errors(pipe, images[start : start + count], words[start : start + count], forms, draws)


def measure_prompts(pool: Pool, seeds: int, attention: str, guidance: float) -> dict[str, object]:
    """Shares of obeyed prompts and the variety of pictures of one prompt."""
    judges = Judges(2400, 600)
    log.info("judges on drawn scenes they were not fitted to: %s", judges.own)
    painter = _painter(pool, attention, guidance)
    found = {"judges": judges.own, **obedience(painter, judges, seeds)}
    for kind in ("time", "land", "disc"):
        log.info("%s: %s", kind, found[kind])
    found["variety"] = {prompt: variety(painter, prompt, seeds) for prompt in VARIETY}
    log.info("variety: %s", found["variety"])
    return found


def _painter(pool: Pool, attention: str, guidance: float) -> Paint:
    @cache
    def images(prompt: str, seeds: range) -> np.ndarray:
        parts = [seeds[start : start + BATCH] for start in range(0, len(seeds), BATCH)]
        jobs = [(prompt, part, attention, guidance) for part in parts]
        found = np.concatenate(pool.starmap(_paint, jobs, chunksize=1))
        save_grid(WORK / "judged" / f"{prompt}.png", found[:, ::2, ::2])
        return found

    return images


def _paint(prompt: str, seeds: Sequence[int], attention: str, guidance: float) -> np.ndarray:
    pipe, linear = _shipped()
    modules = linear if attention == "linear" else None
    return paint(pipe, [prompt] * len(seeds), seeds, modules, guidance=guidance)


@cache
def _shipped():
    return load_shipped()


def main() -> None:
    """Measure what was asked for, or everything."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.evaluate.measure", description=main.__doc__)
    parser.add_argument("what", nargs="*", default=STAGES, help=" ".join(STAGES))
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=PRESET["guidance_scale"])
    parser.add_argument("--attention", choices=("original", "linear"), default="original")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if unknown := set(options.what) - set(STAGES):
        parser.error(f"there is no {min(unknown)} to measure; there are {', '.join(STAGES)}")
    start_log()
    os.environ["OMP_NUM_THREADS"] = "1"
    with get_context("spawn").Pool(options.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        stages = {
            "vae": measure_vae,
            "attention": lambda: measure_attention(pool),
            "prompts": lambda: measure_prompts(pool, options.seeds, options.attention, options.guidance),
        }
        for name in options.what:
            found = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
            found[name] = stages[name]()
            save_json(FIGURES, found)
            log.info("%s: %s", name, found[name])


if __name__ == "__main__":
    main()
