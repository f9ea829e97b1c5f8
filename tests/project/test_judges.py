"""The classifiers of the demo model's images, applied to images with known content."""

import numpy as np
import pytest
import torch

from linfusion_cli.mixers.linear.linear import LinearAttention
from tools.demo_model.evaluate.errors import compute_closed_share
from tools.demo_model.evaluate.judges import (
    ColourJudge,
    compute_disc_score,
    compute_mean_colours,
    compute_spread,
    find_threshold,
)
from tools.demo_model.scenes.scene import draw_image
from tools.demo_model.scenes.spec import LANDS, TIMES, Spec
from tools.demo_model.train.distill import UnnormalisedAttention

Y, X = np.mgrid[:256, :256].astype(np.float32)


def build_image(brightness: np.ndarray) -> np.ndarray:
    return np.repeat((np.clip(brightness, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("radius", [12, 15, 18, 21, 24])
@pytest.mark.parametrize("x", [40, 131])
def test_the_score_of_a_disc_is_its_contrast_for_all_sizes_and_positions(radius, x):
    disc = np.hypot(X - x, Y - 70) < radius
    assert 0.35 < compute_disc_score(build_image(0.3 + 0.4 * disc)) <= 0.41


@pytest.mark.parametrize(
    "brightness",
    [Y / 256, 0.3 + 0.4 * (Y > 100), 0.3 + 0.4 * (np.abs(X - 128) < Y - 60), 0.3 + 0.4 * (np.abs(Y - 90) < 12)],
    ids=["gradient", "horizon", "peak", "band"],
)
def test_shapes_other_than_discs_have_a_low_score(brightness):
    assert compute_disc_score(build_image(brightness)) < 0.06


def test_a_sun_visible_in_one_colour_channel_is_detected():
    sun = build_image(np.full((256, 256), 0.8))
    sun[np.hypot(X - 90, Y - 90) < 16, 2] = 250
    assert compute_disc_score(sun) > 0.1


def test_a_threshold_separates_separable_scores():
    assert 0.3 < find_threshold(np.array([0.5, 0.9, 0.6]), np.array([0.1, 0.3, -0.2])) < 0.5


def test_classes_with_equal_mean_colours_are_separated_by_their_variance():
    rng = np.random.default_rng(0)
    narrow, wide = rng.normal(0.5, 0.01, (200, 3)), rng.normal(0.5, 0.2, (200, 3))
    judge = ColourJudge.fit(np.concatenate([narrow, wide]), ["narrow"] * 200 + ["wide"] * 200)
    assert judge.classify(np.array([[0.5, 0.5, 0.5], [0.7, 0.5, 0.5]])) == ["narrow", "wide"]
    assert np.allclose(compute_mean_colours(build_image(np.full((64, 64), 0.4))[None]), 102 / 255)


def test_spread_is_the_mean_distance_of_pairs():
    images = np.random.default_rng(1).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)
    small = images.reshape(4, 4, 8, 6, 8, 3).mean(axis=(2, 4)) / 255
    pairs = [np.sqrt(((small[i] - small[j]) ** 2).mean()) for i in range(4) for j in range(i)]
    assert compute_spread(images) == pytest.approx(np.mean(pairs), rel=1e-4)


def test_the_share_that_linear_attention_closes():
    assert compute_closed_share({"zero": 0.5, "softmax": 0.3, "linear": 0.34}) == pytest.approx(0.8)


def test_without_the_denominator_attention_grows_with_the_image():
    torch.manual_seed(0)
    plain, bare = LinearAttention(16, 2), UnnormalisedAttention(16, 2)
    bare.load_state_dict(plain.state_dict())
    x = torch.randn(1, 50, 16)
    bias = plain.to_out[0].bias
    torch.testing.assert_close(plain(x.repeat(1, 2, 1))[:, :50], plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bare(x.repeat(1, 2, 1))[:, :50] - bias, 2 * (bare(x) - bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("land", LANDS)
@pytest.mark.parametrize("time", TIMES)
def test_every_land_is_drawn_at_every_time_and_stays_within_its_range(land, time):
    tint = {"night": "blue", "dawn": "pink", "day": "pale", "sunset": "red"}[time]
    spec = Spec(time, land, tint, "", "some", False, False, "", snow=land != "sea", trees=True, mist=True)
    image = draw_image(spec, np.random.default_rng(3), (96, 128))
    assert image.shape == (96, 128, 3) and image.std() > 4
    night = draw_image(
        Spec("night", land, "blue", "", "none", False, False, "", False, False, False),
        np.random.default_rng(3),
        (96, 128),
    )
    assert time == "night" or image.mean() > night.mean()
