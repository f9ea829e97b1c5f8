"""ControlNets from request to file: at the base what diffusers' pipelines make, above it in strips."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from PIL import Image

from linfusion_cli.geometry import Size
from linfusion_cli.jobs.generate import generate
from linfusion_cli.request import GenerateRequest
from tests.control_in_small import small_control, small_union, write_control
from tests.fakes import Listener
from tests.models_in_small import small_sd_unet, small_xl_unet

STEPS = 3
PHASES = ("base", "all", "1")


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """The folders of ControlNets by name."""
    folder = tmp_path_factory.mktemp("controlnets")
    made = {
        "xl": small_control(small_xl_unet(), 1),
        "bgr": small_control(small_xl_unet(), 2, controlnet_conditioning_channel_order="bgr"),
        "sd": small_control(small_sd_unet(), 3),
        "union": small_union(small_xl_unet(), 4),
    }
    return {name: str(write_control(folder / name, net)) for name, net in made.items()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Control pictures by name: noise of the base's size, another of twice that, and one of other proportions."""
    folder, numbers = tmp_path_factory.mktemp("control"), np.random.default_rng(0)
    sizes = {"a": (64, 64), "b": (64, 64), "large": (128, 128), "wide": (80, 64)}
    for name, (width, height) in sizes.items():
        Image.fromarray(numbers.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    return {name: str(folder / f"{name}.png") for name in sizes}


@pytest.fixture
def make(xl_model, tmp_path):
    """generate() with small settings -> the picture it writes, as numbers between 0 and 1."""

    def run(**changed):
        values = {"prompt": "a hill", "size": Size(64, 64), "model": str(xl_model), "steps": (STEPS,)}
        values |= {"guidance_scale": (3.0,), "output": tmp_path / "out.png", "overwrite": True, "strength": (0.7,)}
        generate(GenerateRequest(**values | changed), {}, Listener())
        return np.asarray(Image.open(tmp_path / "out.png")) / 255

    return run


def by_diffusers(pipeline, **more) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    how = {"width": 64, "height": 64, "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
    return pipeline("a hill", generator=torch.Generator("cpu").manual_seed(0), **how, **more).images[0]


def opened(*paths: str) -> list[Image.Image]:
    return [Image.open(path) for path in paths]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=0.6 / 255)


@pytest.mark.parametrize("name", ["xl", "bgr"])
def test_the_base_is_the_picture_that_diffusers_makes(make, xl_model, nets, pictures, name):
    found = make(linfusion="none", controlnet=(nets[name],), control_image=(pictures["a"],), control_scale=(0.7,))
    net = ControlNetModel.from_pretrained(nets[name])
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(xl_model, controlnet=net)
    (image,) = opened(pictures["a"])
    expected = by_diffusers(pipeline, image=image, controlnet_conditioning_scale=0.7)
    assert_same(found, expected)
    assert np.abs(expected - make(linfusion="none")).mean() > 0.01


def test_sd15_takes_the_same_road(make, sd_model, nets, pictures):
    found = make(model=str(sd_model), linfusion="none", controlnet=(nets["sd"],), control_image=(pictures["b"],))
    net = ControlNetModel.from_pretrained(nets["sd"])
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(sd_model, controlnet=net)
    assert_same(found, by_diffusers(pipeline, image=opened(pictures["b"])[0]))


def test_several_are_diffusers_several(make, xl_model, nets, pictures):
    both, names = (nets["xl"], nets["bgr"]), (pictures["a"], pictures["b"])
    found = make(linfusion="none", controlnet=both, control_image=names, control_scale=(0.5, 0.9))
    several = [ControlNetModel.from_pretrained(net) for net in both]
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(xl_model, controlnet=several)
    assert_same(found, by_diffusers(pipeline, image=opened(*names), controlnet_conditioning_scale=[0.5, 0.9]))


@pytest.mark.parametrize("written", ["canny", "lineart", "3"])
def test_a_union_model_is_told_what_its_picture_shows(make, xl_model, nets, pictures, written):
    found = make(linfusion="none", controlnet=(nets["union"],), control_image=(pictures["a"],), control_type=(written,))
    net = ControlNetUnionModel.from_pretrained(nets["union"])
    pipeline = StableDiffusionXLControlNetUnionPipeline.from_pretrained(xl_model, controlnet=net)
    assert_same(found, by_diffusers(pipeline, control_image=opened(pictures["a"]), control_mode=[3]))
    if written == "3":
        other = by_diffusers(pipeline, control_image=opened(pictures["a"]), control_mode=[1])
        assert np.abs(found - other).mean() > 0.003


def test_higher_phases_are_controlled_where_they_are_named(make, nets, pictures):
    how = {"size": Size(128, 128), "controlnet": (nets["xl"],), "steps": (2,), "guidance_scale": (1.0,)}
    how |= {"upscaler": "demofusion", "dilated_min": 0.0, "control_scale": (4.0,)}
    base, both, above = (make(control_image=(pictures["large"],), control_phases=(name,), **how) for name in PHASES)
    for one, other in ((base, both), (above, both), (above, base)):
        assert np.abs(one - other).mean() > 0.003
    other = make(control_image=(pictures["b"],), control_phases=("1",), **how)
    assert np.abs(other - above).mean() > 0.003
