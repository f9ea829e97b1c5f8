from pathlib import Path

import numpy as np
import pytest

from linfusion_cli.images import ImageInfo, RowSink, format_a1111_parameters

PROMPT = 'a 🐱 [cat] (large:1.2), {x|y} <lora:a:1>\nsecond line\t\x07\x1b[31m \\ "quoted" 日本 & </rdf:li> ]]>'


def make_image(width_px: int, height_px: int, bits: int = 8, seed: int = 0) -> np.ndarray:
    """Return gradients with noise that use the whole range of `bits`."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 0.9, height_px)[:, None, None] * np.linspace(0.2, 1, width_px)[None, :, None]
    noisy = ramp * [1.0, 0.7, 0.4] + random.random((height_px, width_px, 3)) * 0.05
    return (noisy * (2**bits - 1)).astype(f"uint{bits}")


def write_unevenly(sink: RowSink, pixels: np.ndarray, seed: int = 0) -> None:
    """Write the rows in pieces of random height, including empty ones."""
    random, row = np.random.default_rng(seed), 0
    while row < len(pixels):
        count = int(random.integers(0, 150))
        sink.write(pixels[row : row + count])
        row += count


def list_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def no_output(capfd):
    yield
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def info() -> ImageInfo:
    parameters = format_a1111_parameters(
        PROMPT,
        "blurry",
        steps=30,
        sampler="Euler, ancestral",
        cfg_scale=5.0,
        seed=7,
        size_px=(1024, 512),
        model="demo",
        version="linfusion 0.1.0",
    )
    request = {"prompt": PROMPT, "negative_prompt": "blurry", "seed": 7, "nested": {"prompt_2": "b", "list": [1, None]}}
    return ImageInfo("linfusion 0.1.0", 300.0, request, PROMPT, "blurry", parameters)
