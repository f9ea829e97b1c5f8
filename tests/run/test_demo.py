"""The embedded demo model follows the prompt."""

import numpy as np
import pytest
from PIL import Image

from linfusion_cli.core.geometry import Size
from linfusion_cli.run.pipeline import generate
from tests.support.requests import make_request

PROMPTS = {
    "night": "a starry night over the sea",
    "day": "a sunny day over hills, blue sky",
    "sunset": "a red sunset at the sea, clouds",
}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Return the mean colour (RGB, 0 to 255) of three images for each prompt."""
    folder = tmp_path_factory.mktemp("demo")

    def measure_colour(name: str, seed: int) -> np.ndarray:
        output = folder / f"{name}-{seed}.png"
        request = make_request(
            prompt=PROMPTS[name],
            size=Size(256, 256),
            output=output,
            model="demo",
            seed=seed,
            steps=(16,),
            guidance_scale=(4.0,),
        )
        generate(request, {})
        return np.asarray(Image.open(output)).mean(axis=(0, 1))

    return {name: np.mean([measure_colour(name, seed) for seed in range(3)], axis=0) for name in PROMPTS}


def test_nights_are_darker_than_days(colours):
    assert colours["night"].mean() + 30 < colours["day"].mean()


def test_sunsets_are_red_and_days_are_blue(colours):
    assert colours["sunset"][0] > colours["sunset"][2] + 40
    assert colours["day"][2] > colours["sunset"][2] + 40
