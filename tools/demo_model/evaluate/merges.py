"""Compare ways to merge LinFusion's weights with a fine-tune: `python -m tools.demo_model.evaluate.merges [KIND ...]`.

Fine-tunes the shipped model on each kind of scene (moon, print, mirror), then compares the noise errors on held-out
scenes of that kind. Results are written to `.work/demo/merges.json`.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from linfusion_cli.mixers.linear.merge import PROJECTIONS, add_difference, copy_own_projections
from linfusion_cli.mixers.linear.mount import find_self_attentions
from tools.demo_model.evaluate.errors import add_noise, predict_noise
from tools.demo_model.evaluate.finetune import (
    HELD_OUT_SCENE,
    KINDS,
    export_model_folder,
    finetune,
    load_finetuned_pipeline,
)
from tools.demo_model.evaluate.sample import load_shipped_model
from tools.demo_model.store import MODEL, WORK, log, save_json, start_log

FIGURES = WORK / "merges.json"
SIZES = {256: (64, 4), 512: (32, 4)}  # side in pixels -> number of held-out scenes, timesteps per scene
MERGES = ("published", "keep", "delta")
FORMS = ("softmax", *MERGES)
PROMPTS = {
    "moon": "a starry night over hills with a bright moon, clouds",
    "print": "mountains at sunset with the sun and clouds",
    "mirror": "a sunset over a lake between mountains with the sun, trees",
}
PARTS = 4
Errors = dict[str, np.ndarray]


def measure(kind: str, pool: Pool) -> dict[str, object]:
    """Return the relative change of one fine-tune's weights and, for each image size, the errors of all forms."""
    found: dict[str, object] = {"moved": measure_change(kind)}
    log.info("%s: relative change of %s", kind, found["moved"])
    for side_px, (count, draws) in SIZES.items():
        share = count // PARTS
        parts = pool.starmap(
            _measure_errors, [(kind, side_px, start, share, draws) for start in range(0, count, share)]
        )
        found[str(side_px)] = compute_figures(
            {form: np.concatenate([part[form] for part in parts]) for form in parts[0]}
        )
        for form, row in found[str(side_px)].items():
            log.info("%s, %d px, %-14s %s", kind, side_px, form, {name: f"{value:.5f}" for name, value in row.items()})
    return found


def compute_figures(errors: Errors) -> dict[str, dict[str, float]]:
    """Return, for each form, the mean error, its excess over `softmax` and over `published`, and the distance.

    Standard errors are those of the differences by scene, because all forms get the same noise.
    """
    found = {}
    for form in (name for name in errors if not name.startswith("distance ")):
        row = {"error": errors[form].mean()}
        for name, other in (("above", "softmax"), ("above published", "published")):
            above = errors[form] - errors[other]
            row |= {name: above.mean(), f"{name}, sem": above.std(ddof=1) / len(above) ** 0.5}
        if f"distance {form}" in errors:
            row["distance"] = errors[f"distance {form}"].mean()
        found[form] = {name: float(value) for name, value in row.items()}
    return found


@torch.no_grad()
def _measure_errors(kind: str, side_px: int, start: int, count: int, draws: int) -> Errors:
    """Return, for each scene, the mean squared error of each form and its distance from the fine-tune's softmax."""
    base, base_linear, pipe, forms = _load_models(kind)
    errors: dict[str, list[float]] = {}
    # each size has different scenes
    scenes = list(KINDS[kind].scenes(HELD_OUT_SCENE + 50 * side_px, start + count, side_px))[start:]
    torch.manual_seed(start)
    for image, words in scenes:
        found: dict[str, list[float]] = {}
        for noise, inputs in add_noise(pipe, image, words, draws):
            predictions = {form: predict_noise(pipe.unet, modules, inputs) for form, modules in forms.items()}
            predictions |= {
                "base": predict_noise(base, None, inputs),
                "base, linear": predict_noise(base, base_linear, inputs),
            }
            distances = {
                f"distance {form}": (predictions[form] - predictions["softmax"]).square().mean() for form in MERGES
            }
            for form, value in (
                {form: (out - noise).square().mean() for form, out in predictions.items()} | distances
            ).items():
                found.setdefault(form, []).append(value.item())
        for form, values in found.items():
            errors.setdefault(form, []).append(float(np.mean(values)))
    return {form: np.array(values) for form, values in errors.items()}


@cache
def _load_models(kind: str):
    shipped, linear = load_shipped_model()
    pipe = load_finetuned_pipeline(kind)
    own, base = find_self_attentions(pipe.unet), find_self_attentions(shipped.unet)
    forms = {"softmax": None} | {way: copy.deepcopy(linear) for way in MERGES}
    copy_own_projections(forms["keep"], own)
    add_difference(forms["delta"], own, lambda path: dict(base[path].named_parameters()))
    return shipped.unet, linear, pipe, forms


def measure_change(kind: str) -> dict[str, float]:
    """The relative change, |W − W_base| / |W_base| of each self-attention projection and of all weights."""
    base, _, pipe, _ = _load_models(kind)
    ours, theirs = pipe.unet.state_dict(), base.state_dict()
    paths = find_self_attentions(base)
    found = {name: [f"{path}.{name}" for path in paths] for name in PROJECTIONS} | {"all": list(theirs)}
    return {name: _compute_relative_change(ours, theirs, names) for name, names in found.items()}


def _compute_relative_change(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], names: list[str]
) -> float:
    change = sum((ours[name] - theirs[name]).square().sum().item() for name in names)
    return (change / sum(theirs[name].square().sum().item() for name in names)) ** 0.5


def save_sheet(path: Path, kinds: Sequence[str], seed: int) -> None:
    """Save a row of 512 px images for each fine-tune, generated by linfusion: softmax, then each merge mode."""
    rows = []
    for kind in kinds:
        model = export_model_folder(kind)
        with tempfile.TemporaryDirectory() as folder:
            rows.append([_generate_image(model, kind, seed, form, Path(folder) / f"{form}.png") for form in FORMS])
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows])).save(path)
    log.info("sheet: %s", path)


def _generate_image(model: Path, kind: str, seed: int, form: str, output: Path) -> np.ndarray:
    merge = [] if form == "softmax" else ["--linfusion-merge", form, "--linfusion-base", "demo"]
    attention = "original" if form == "softmax" else "linear"
    command = [sys.executable, "-m", "linfusion_cli", "generate", PROMPTS[kind], "--preset", "demo", "--size", "512"]
    command += ["--model", str(model), "--linfusion", str(MODEL / "linfusion"), "--attention", attention, *merge]
    subprocess.run([*command, "--seed", str(seed), "-o", str(output), "--quiet"], check=True)
    return np.asarray(Image.open(output))


def main() -> None:
    """Fine-tune and measure the kinds given, or all."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.evaluate.merges", description=main.__doc__)
    parser.add_argument("kinds", nargs="*", default=tuple(KINDS), help=" ".join(KINDS))
    parser.add_argument("--minutes", type=float, default=10.0, help="training time of each fine-tune")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of generated images to this file")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"unknown kind: {min(unknown)} (choose from {', '.join(KINDS)})")
    start_log()
    for kind in options.kinds:
        finetune(kind, options.minutes, options.processes)
    os.environ["OMP_NUM_THREADS"] = "1"
    with get_context("spawn").Pool(options.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for kind in options.kinds:
            found = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
            save_json(FIGURES, found | {kind: measure(kind, pool)})
    if options.sheet:
        save_sheet(options.sheet, options.kinds, options.seed)


if __name__ == "__main__":
    main()
