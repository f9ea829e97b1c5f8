"""ControlNets from the request to the file: the base matches diffusers, higher phases run in strips."""

import json
import shutil

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

from linfusion_cli.core.errors import DataError, InputNotFound, Unavailable, UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.run.pipeline import generate
from linfusion_cli.run.stages import predictors
from linfusion_cli.unet.predict import WholeUNet
from tests.support.fakes import Listener
from tests.support.requests import make_request
from tests.support.small_controlnets import build_small_controlnet, build_small_union_controlnet, write_controlnet
from tests.support.small_models import build_small_sd_unet, build_small_xl_unet

STEPS = 3
PHASES = ("base", "all", "1")


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Write small ControlNets and return their folders by name."""
    folder = tmp_path_factory.mktemp("controlnets")
    controlnets = {
        "xl": build_small_controlnet(build_small_xl_unet(), 1),
        "bgr": build_small_controlnet(build_small_xl_unet(), 2, controlnet_conditioning_channel_order="bgr"),
        "sd": build_small_controlnet(build_small_sd_unet(), 3),
        "union": build_small_union_controlnet(build_small_xl_unet(), 4),
    }
    return {name: str(write_controlnet(folder / name, net)) for name, net in controlnets.items()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write control images of noise and return them by name: two of the base's size, a larger and a wider one."""
    folder, numbers = tmp_path_factory.mktemp("control"), np.random.default_rng(0)
    sizes = {"a": (64, 64), "b": (64, 64), "large": (128, 128), "wide": (80, 64)}
    for name, (width, height) in sizes.items():
        Image.fromarray(numbers.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    return {name: str(folder / f"{name}.png") for name in sizes}


@pytest.fixture
def make(xl_model, tmp_path, phases):
    """Return a function that calls generate() and returns the pixels between 0 and 1, or the latents of the base."""

    def run(wants_latents=False, **changed):
        values = {"prompt": "a hill", "size": Size(64, 64), "model": str(xl_model), "steps": (STEPS,)}
        values |= {"guidance_scale": (3.0,), "output": tmp_path / "out.png", "overwrite": True, "strength": (0.7,)}
        phases.clear()
        generate(make_request(**values | changed), {}, Listener())
        return phases[0][1].latents if wants_latents else np.asarray(Image.open(tmp_path / "out.png")) / 255

    return run


def run_diffusers(pipeline, **more) -> torch.Tensor:
    """Return the final latents of a diffusers pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    how = {"width": 64, "height": 64, "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    return pipeline("a hill", generator=torch.Generator("cpu").manual_seed(0), **how, **more).images


def open_images(*paths: str) -> list[Image.Image]:
    return [Image.open(path) for path in paths]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["xl", "bgr"])
def test_the_base_matches_diffusers(make, xl_model, nets, images, name):
    how = {"controlnet": (nets[name],), "control_image": (images["a"],), "control_scale": (0.7,)}
    found = make(True, linfusion="none", **how)
    net = ControlNetModel.from_pretrained(nets[name])
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(xl_model, controlnet=net)
    (image,) = open_images(images["a"])
    expected = run_diffusers(pipeline, image=image, controlnet_conditioning_scale=0.7)
    assert relative_error(found, expected) <= 1e-5
    if name == "xl":
        assert relative_error(make(True, linfusion="none"), expected) > 0.01
        assert relative_error(make(True, linfusion="none", **how | {"control_image": (images["b"],)}), expected) > 0.001


def test_sd15_works_too(make, sd_model, nets, images):
    found = make(True, model=str(sd_model), linfusion="none", controlnet=(nets["sd"],), control_image=(images["b"],))
    net = ControlNetModel.from_pretrained(nets["sd"])
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(sd_model, controlnet=net)
    assert relative_error(found, run_diffusers(pipeline, image=open_images(images["b"])[0])) <= 1e-5


def test_several_controlnets_match_diffusers(make, xl_model, nets, images):
    both, names = (nets["xl"], nets["bgr"]), (images["a"], images["b"])
    found = make(True, linfusion="none", controlnet=both, control_image=names, control_scale=(0.5, 0.9))
    several = [ControlNetModel.from_pretrained(net) for net in both]
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(xl_model, controlnet=several)
    expected = run_diffusers(pipeline, image=open_images(*names), controlnet_conditioning_scale=[0.5, 0.9])
    assert relative_error(found, expected) <= 1e-5


def test_a_union_model_uses_the_control_type(make, xl_model, nets, images):
    how = {"controlnet": (nets["union"],), "control_image": (images["a"],), "control_type": ("lineart",)}
    found = make(True, linfusion="none", **how)
    net = ControlNetUnionModel.from_pretrained(nets["union"])
    pipeline = StableDiffusionXLControlNetUnionPipeline.from_pretrained(xl_model, controlnet=net)
    assert (
        relative_error(found, run_diffusers(pipeline, control_image=open_images(images["a"]), control_mode=[3])) <= 1e-5
    )
    other = run_diffusers(pipeline, control_image=open_images(images["a"]), control_mode=[1])
    assert relative_error(found, other) > 0.001


def test_several_union_models_match_diffusers(make, xl_model, nets, images):
    """The same union model twice, with different control types."""
    names = (images["a"], images["b"])
    how = {"controlnet": (nets["union"],) * 2, "control_image": names, "control_scale": (0.6, 1.3)}
    found = make(True, linfusion="none", control_type=("canny", "depth"), **how)
    several = [ControlNetUnionModel.from_pretrained(nets["union"]) for _ in names]
    pipeline = StableDiffusionXLControlNetUnionPipeline.from_pretrained(xl_model, controlnet=several)
    more = {"control_mode": [3, 1], "controlnet_conditioning_scale": [0.6, 1.3]}
    assert relative_error(found, run_diffusers(pipeline, control_image=open_images(*names), **more)) <= 1e-5


def test_controlnets_act_in_the_given_phases(make, nets, images):
    how = {"size": Size(128, 128), "controlnet": (nets["xl"],), "steps": (2,), "guidance_scale": (1.0,)}
    how |= {"upscaler": "demofusion", "dilated_min": 0.0, "control_scale": (4.0,)}
    base, both, above = (make(control_image=(images["large"],), control_phases=(name,), **how) for name in PHASES)
    for one, other in ((base, both), (above, both), (above, base)):
        assert np.abs(one - other).mean() > 0.003
    other = make(control_image=(images["b"],), control_phases=("1",), **how)
    assert np.abs(other - above).mean() > 0.003


def test_images_of_other_sizes_and_with_alpha_are_fitted(make, tmp_path, nets, images):
    """Large images are downscaled, and transparent parts become black."""
    control = {"linfusion": "none", "controlnet": (nets["xl"],), "steps": (1,), "guidance_scale": (1.0,)}
    colours = np.asarray(Image.open(images["a"]))
    opaque = np.arange(64)[:, None] < 20 + np.zeros((1, 64), int)
    Image.fromarray(np.dstack([colours, np.uint8(255 * opaque)])).save(tmp_path / "alpha.png")
    Image.fromarray(colours * opaque[..., None].astype(np.uint8)).save(tmp_path / "black.png")
    one, other = (make(control_image=(str(tmp_path / name),), **control) for name in ("alpha.png", "black.png"))
    assert np.array_equal(one, other)
    Image.fromarray(colours.repeat(3, axis=0).repeat(3, axis=1)).save(tmp_path / "large.tif")
    reduced, first = (make(control_image=(name,), **control) for name in (str(tmp_path / "large.tif"), images["a"]))
    assert np.abs(reduced - first).mean() < np.abs(one - first).mean()


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"control_image": ()}, UsageError, "--control-image"),
        ({"control_image": ("{a}", "{b}")}, UsageError, "--control-image"),
        ({"control_image": ("nowhere.png",)}, InputNotFound, r"nowhere\.png"),
        ({"control_image": ("{sd}/config.json",)}, DataError, r"config\.json"),
        ({"control_image": ("{wide}",)}, UsageError, "64x64"),
        ({"controlnet": ("nobody/nothing",)}, Unavailable, "--controlnet nobody/nothing"),
        ({"controlnet": ("{sd}",)}, DataError, "block_out_channels"),
        ({"controlnet": ("{union}",)}, UsageError, "--control-type"),
        ({"control_type": ("canny",)}, UsageError, "--control-type .*canny"),
        ({"controlnet": ("{union}",), "control_type": ("tile",)}, UsageError, "--control-type .*tile"),
        ({"control_phases": ("1",)}, UsageError, "--control-phases .*1"),
        ({"control_phases": ("top",)}, UsageError, "--control-phases .*top"),
        ({"control_scale": (1.0, 1.0)}, UsageError, "--control-scale"),
        ({"control_scale": (-1.0,)}, UsageError, "--control-scale"),
    ],
)
def test_invalid_settings_are_refused_before_any_work(make, tmp_path, nets, images, changed, kind, says):
    names = nets | images
    given = {"controlnet": ("{xl}",), "control_image": ("{a}",)} | changed
    filled = {
        name: tuple(value.format(**names) if isinstance(value, str) else value for value in values)
        for name, values in given.items()
    }
    with pytest.raises(kind, match=says):
        make(**filled)
    assert not list(tmp_path.iterdir())


def test_a_controlnet_without_linear_attention_is_refused_in_strips(make, tmp_path, nets, images):
    """A ControlNet with more transformer blocks than the UNet can only run whole, at the base."""
    deeper = dict(build_small_xl_unet().config) | {"transformer_layers_per_block": (1, 2, 2)}
    net = build_small_controlnet(type(build_small_xl_unet()).from_config(deeper))
    how = {"controlnet": (str(write_controlnet(tmp_path / "net", net)),), "control_image": (images["a"],)}
    with pytest.raises(DataError, match=r"down_blocks\.1.*transformer_blocks\.1\.attn1.*Attention"):
        make(size=Size(128, 128), control_phases=("all",), **how)
    make(size=Size(64, 64), **how)


def test_the_prediction_type_is_probed_without_controlnets(make, tmp_path, sd_model, nets, images):
    """The probe uses latents of another size than the control images."""
    model = shutil.copytree(sd_model, tmp_path / "model")
    schedule = model / "scheduler" / "scheduler_config.json"
    config = json.loads(schedule.read_text())
    del config["prediction_type"]
    schedule.write_text(json.dumps(config))
    wide = str(tmp_path / "wide.png")
    Image.open(images["a"]).resize((128, 64)).save(wide)
    make(model=str(model), linfusion="none", size=Size(128, 64), controlnet=(nets["sd"],), control_image=(wide,))


def test_a_controlled_phase_in_strips_matches_the_whole_forward(make, nets, images, monkeypatch):
    """Two ControlNets with different images, and a size that is cropped from a larger phase."""

    def build_whole_runners(run, unet, strategy, phase, controlnets):
        whole = [control.build_whole() for control in controlnets]
        return [WholeUNet(unet, dilation, whole) for dilation in (1, phase.dilation)]

    how = {"size": Size(124, 116), "controlnet": (nets["xl"], nets["union"]), "control_type": ("depth",)}
    how |= {"control_image": (images["large"], images["b"]), "control_phases": ("1",), "steps": (2,)}
    found = make(guidance_scale=(1.0,), upscaler="demofusion", **how)
    monkeypatch.setattr(predictors, "build_runners", build_whole_runners)
    expected = make(guidance_scale=(1.0,), upscaler="demofusion", **how)
    assert np.abs(found - expected).max() <= 1.1 / 255
