"""Measure the shipped model: `python -m tools.demo_model.evaluate.measure [vae] [attention] [prompts]`.

Results are written to `.work/demo/figures.json`, the classified images to `.work/demo/judged/`.
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

from tools.demo_model.evaluate.errors import build_zero_attentions, compute_closed_share, measure_noise_errors
from tools.demo_model.evaluate.obey import VARIETY, ImageGenerator, Judges, measure_obedience, measure_variety
from tools.demo_model.evaluate.sample import PRESET, generate_images, load_shipped_model, save_grid
from tools.demo_model.store import WORK, log, save_json, start_log
from tools.demo_model.train.distill import get_result_path, load_linear
from tools.demo_model.train.draw import load_captions, load_shards
from tools.demo_model.train.vae import measure_reconstruction

FIGURES = WORK / "figures.json"
BATCH = 16
STAGES = ("vae", "attention", "prompts")
# held-out group -> number of scenes, timesteps per scene
SIZES = {"held_out": (128, 4), "held_out_2": (64, 3), "held_out_4": (32, 3)}


def measure_vae() -> dict[str, float]:
    """Return the PSNR of the VAE and of thumbnails on all held-out scenes, and the errors of the mean colours."""
    images = np.concatenate(load_shards("held_out"))
    return measure_reconstruction(_load_shared_model()[0].vae, images)


def measure_attention(pool: Pool) -> dict[str, dict[str, float]]:
    """Return the noise errors by image size and form of attention."""
    found = {}
    for name, (count, draws) in SIZES.items():
        parts = pool.starmap(
            _measure_errors, [(name, start, count // 4, draws) for start in range(0, count, count // 4)]
        )
        errors = {form: float(np.mean([part[form] for part in parts])) for form in parts[0]}
        found[name] = errors | {"closed": compute_closed_share(errors)}
        log.info("attention, %s: %s", name, found[name])
    return found


def _measure_errors(name: str, start: int, count: int, draws: int) -> dict[str, float]:
    pipe, linear = _load_shared_model()
    forms = {"softmax": None, "linear": linear, "zero": build_zero_attentions(pipe.unet)}
    for stage in ("distill_linear", "distill_unnormalised"):  # not part of the shipped model
        if get_result_path(stage).exists():
            forms[stage] = load_linear(pipe.unet, stage)
    images, words = np.concatenate(load_shards(name)), load_captions(name)
    return measure_noise_errors(pipe, images[start : start + count], words[start : start + count], forms, draws)


def measure_prompts(pool: Pool, seeds: int, attention: str, guidance: float) -> dict[str, object]:
    """Return the shares of images that match their prompts, and the variety of images with the same prompt."""
    judges = Judges(2400, 600)
    log.info("accuracy of the judges on drawn scenes not used to fit them: %s", judges.accuracy)
    generate = _build_generator(pool, attention, guidance)
    found = {"judges": judges.accuracy, **measure_obedience(generate, judges, seeds)}
    for kind in ("time", "land", "disc"):
        log.info("%s: %s", kind, found[kind])
    found["variety"] = {prompt: measure_variety(generate, prompt, seeds) for prompt in VARIETY}
    log.info("variety: %s", found["variety"])
    return found


def _build_generator(pool: Pool, attention: str, guidance: float) -> ImageGenerator:
    @cache
    def images(prompt: str, seeds: range) -> np.ndarray:
        parts = [seeds[start : start + BATCH] for start in range(0, len(seeds), BATCH)]
        jobs = [(prompt, part, attention, guidance) for part in parts]
        found = np.concatenate(pool.starmap(_generate_batch, jobs, chunksize=1))
        save_grid(WORK / "judged" / f"{prompt}.png", found[:, ::2, ::2])
        return found

    return images


def _generate_batch(prompt: str, seeds: Sequence[int], attention: str, guidance: float) -> np.ndarray:
    pipe, linear = _load_shared_model()
    modules = linear if attention == "linear" else None
    return generate_images(pipe, [prompt] * len(seeds), seeds, modules, guidance=guidance)


@cache
def _load_shared_model():
    return load_shipped_model()


def main() -> None:
    """Run the measurements given, or all."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.evaluate.measure", description=main.__doc__)
    parser.add_argument("stages", nargs="*", default=STAGES, help=" ".join(STAGES))
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=PRESET["guidance_scale"])
    parser.add_argument("--attention", choices=("original", "linear"), default="original")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown measurement: {min(unknown)} (choose from {', '.join(STAGES)})")
    start_log()
    os.environ["OMP_NUM_THREADS"] = "1"
    with get_context("spawn").Pool(options.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        stages = {
            "vae": measure_vae,
            "attention": lambda: measure_attention(pool),
            "prompts": lambda: measure_prompts(pool, options.seeds, options.attention, options.guidance),
        }
        for name in options.stages:
            found = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
            found[name] = stages[name]()
            save_json(FIGURES, found)
            log.info("%s: %s", name, found[name])


if __name__ == "__main__":
    main()
