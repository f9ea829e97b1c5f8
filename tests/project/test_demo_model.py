"""A small share of what docs/demo-model.md reports, measured on the shipped model: no worse one takes its place unseen.

The bounds leave room for few seeds; `python -m tools.demo_model.evaluate.measure` measures the whole.
"""

from functools import cache

import numpy as np
import pytest

from linfusion_cli.models.files.header import read_header
from tools.demo_model.evaluate.errors import closed, noise_errors, zeroed
from tools.demo_model.evaluate.obey import FIRST, Judges, obedience, variety
from tools.demo_model.evaluate.sample import load_shipped, paint
from tools.demo_model.scenes.scene import scene
from tools.demo_model.store import MODEL
from tools.demo_model.train.vae import measure

pytestmark = pytest.mark.slow

SEEDS = 5


@pytest.fixture(scope="module")
def shipped():
    return load_shipped()


@pytest.fixture(scope="module")
def painter(shipped):
    """Pictures of a prompt, made once."""

    @cache
    def images(prompt: str, seeds: range) -> np.ndarray:
        return paint(shipped[0], [prompt] * len(seeds), seeds, shipped[1])

    return images


@pytest.fixture(scope="module")
def judges():
    return Judges(count=480, steps=300)


def scenes(numbers: range, side_px: int) -> tuple[np.ndarray, list[str]]:
    images, captions = zip(*(scene(number, (side_px, side_px)) for number in numbers), strict=True)
    return np.stack(images), list(captions)


def test_it_is_small():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 16 * 1024 * 1024


def test_the_vae_carries_more_than_a_thumbnail_and_keeps_colours(shipped):
    images, _ = scenes(range(FIRST + 10_000, FIRST + 10_024), 256)
    found = measure(shipped[0].vae, images)
    assert found["psnr"] >= found["psnr_thumbnail"] + 1
    assert found["mean_off"] <= 1 and found["mean_off_worst"] <= 3


def test_judges_know_drawn_scenes(judges):
    assert judges.own["time"] >= 0.97 and judges.own["disc"] >= 0.95 and judges.own["land"] >= 0.85


def test_prompts_are_obeyed(painter, judges):
    found = obedience(painter, judges, SEEDS)
    for kind, least in {"time": 0.9, "disc": 0.85, "land": 0.8}.items():
        assert np.mean(list(found[kind].values())) >= least, found[kind]


def test_images_of_one_prompt_differ(painter):
    assert variety(painter, "a blue day over mountains with a clear sky and a sun", 12)["ratio"] >= 0.65


def test_linear_attention_does_what_softmax_does(shipped):
    pipe, linear = shipped
    forms = {"softmax": None, "linear": linear, "zero": zeroed(pipe.unet)}
    errors = noise_errors(pipe, *scenes(range(FIRST + 20_000, FIRST + 20_016), 256), forms, draws=2)
    assert errors["softmax"] < errors["zero"] and closed(errors) >= 0.75


@pytest.mark.parametrize(("side_px", "count"), [(512, 6), (1024, 2)])
def test_on_larger_images_linear_attention_is_no_worse_than_softmax(shipped, side_px, count):
    pipe, linear = shipped
    forms = {"softmax": None, "linear": linear}
    large = noise_errors(pipe, *scenes(range(FIRST + 30_000, FIRST + 30_000 + count), side_px), forms, draws=2)
    assert large["linear"] <= 1.01 * large["softmax"]


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_encoders_are_named_as_every_version_of_transformers_reads_them(part):
    """Older ones look for all layers under `text_model.`, newer ones find them there as well."""
    names = read_header(MODEL / part / "model.safetensors").shapes
    assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
