"""The shipped demo model keeps the quality reported in docs/demo-model.md.

The bounds are loose because few seeds are used; `python -m tools.demo_model.evaluate.measure` runs all measurements.
"""

from functools import cache

import numpy as np
import pytest

from linfusion_cli.models.files.header import read_header
from tools.demo_model.evaluate.errors import build_zero_attentions, compute_closed_share, measure_noise_errors
from tools.demo_model.evaluate.obey import FIRST_SCENE, Judges, measure_obedience, measure_variety
from tools.demo_model.evaluate.sample import generate_images, load_shipped_model
from tools.demo_model.scenes.scene import draw_scene
from tools.demo_model.store import MODEL
from tools.demo_model.train.vae import measure_reconstruction

pytestmark = pytest.mark.slow

SEEDS = 5


@pytest.fixture(scope="module")
def shipped_model():
    return load_shipped_model()


@pytest.fixture(scope="module")
def generate(shipped_model):
    """Return a function that generates the images of a prompt, with a cache."""

    @cache
    def images(prompt: str, seeds: range) -> np.ndarray:
        return generate_images(shipped_model[0], [prompt] * len(seeds), seeds, shipped_model[1])

    return images


@pytest.fixture(scope="module")
def judges():
    return Judges(count=480, steps=300)


def draw_scenes(numbers: range, side_px: int) -> tuple[np.ndarray, list[str]]:
    images, captions = zip(*(draw_scene(number, (side_px, side_px)) for number in numbers), strict=True)
    return np.stack(images), list(captions)


def test_the_model_is_small():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 16 * 1024 * 1024


def test_the_vae_is_better_than_a_thumbnail_and_preserves_colours(shipped_model):
    images, _ = draw_scenes(range(FIRST_SCENE + 10_000, FIRST_SCENE + 10_024), 256)
    found = measure_reconstruction(shipped_model[0].vae, images)
    assert found["psnr"] >= found["psnr_thumbnail"] + 1
    assert found["mean_off"] <= 1 and found["mean_off_worst"] <= 3


def test_judges_classify_drawn_scenes(judges):
    assert judges.accuracy["time"] >= 0.97 and judges.accuracy["disc"] >= 0.95 and judges.accuracy["land"] >= 0.85


def test_images_match_their_prompts(generate, judges):
    found = measure_obedience(generate, judges, SEEDS)
    for kind, minimum in {"time": 0.9, "disc": 0.85, "land": 0.8}.items():
        assert np.mean(list(found[kind].values())) >= minimum, found[kind]


def test_images_of_one_prompt_differ(generate):
    assert measure_variety(generate, "a blue day over mountains with a clear sky and a sun", 12)["ratio"] >= 0.65


def test_linear_attention_is_close_to_softmax(shipped_model):
    pipe, linear = shipped_model
    forms = {"softmax": None, "linear": linear, "zero": build_zero_attentions(pipe.unet)}
    errors = measure_noise_errors(
        pipe, *draw_scenes(range(FIRST_SCENE + 20_000, FIRST_SCENE + 20_016), 256), forms, draws=2
    )
    assert errors["softmax"] < errors["zero"] and compute_closed_share(errors) >= 0.75


@pytest.mark.parametrize(("side_px", "count"), [(512, 6), (1024, 2)])
def test_on_larger_images_linear_attention_is_no_worse_than_softmax(shipped_model, side_px, count):
    pipe, linear = shipped_model
    forms = {"softmax": None, "linear": linear}
    large = measure_noise_errors(
        pipe, *draw_scenes(range(FIRST_SCENE + 30_000, FIRST_SCENE + 30_000 + count), side_px), forms, draws=2
    )
    assert large["linear"] <= 1.01 * large["softmax"]


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_encoder_weights_load_in_all_versions_of_transformers(part):
    """Old versions need the `text_model.` prefix; new versions accept it."""
    names = read_header(MODEL / part / "model.safetensors").shapes
    assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
