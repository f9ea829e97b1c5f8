"""The presets for few steps produce the same images as diffusers with the published settings and the same LoRA."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import save_file

from linfusion_cli import settings
from linfusion_cli.core.geometry import Size
from linfusion_cli.mixers.linear.weights import load_weights
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.load.networks import load_unet
from linfusion_cli.run.pipeline import generate
from tests.support.fakes import Listener
from tests.support.requests import make_request

# From the model cards: the scheduler class and the options that override the model's scheduler config.
PUBLISHED = {
    "sdxl-lcm": (LCMScheduler, {}),
    "sdxl-lightning": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "sdxl-hyper": (DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}),
}


@pytest.fixture(scope="module")
def lora(xl_model, tmp_path_factory):
    """Write a LoRA of rank 2 with random factors for all attention projections, in diffusers' layout."""
    torch.manual_seed(3)
    factors, unet = {}, load_unet(Model(xl_model), torch.float32)
    for path, module in unet.named_modules():
        if path.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            factors[f"unet.{path}.lora_A.weight"] = 0.3 * torch.randn(2, module.in_features)
            factors[f"unet.{path}.lora_B.weight"] = 0.3 * torch.randn(module.out_features, 2)
    file = tmp_path_factory.mktemp("lora") / "few.safetensors"
    save_file(factors, file)
    return file


@pytest.fixture
def make(xl_model, tmp_path, lora):
    def run(preset, output="out.png", **changed):
        values = dict(settings.read_preset_layer(preset).values) | {"prompt": "a hill", "model": str(xl_model)}
        values |= {"lora": (f"{lora}:0.8",), "size": Size(64, 64), "output": tmp_path / output}
        return generate(make_request(**values | changed), {}, Listener())

    return run


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_base_matches_diffusers_with_the_published_settings(make, preset, xl_model, lora, tmp_path):
    make(preset, seed=5)
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_model)
    kind, options = PUBLISHED[preset]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipeline.fuse_lora(lora_scale=0.8)
    expected = pipeline(
        "a hill", width=64, height=64, num_inference_steps=8, guidance_scale=0.0, output_type="np",
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    found = np.asarray(Image.open(tmp_path / "out.png")) / 255
    np.testing.assert_allclose(found, expected, atol=0.6 / 255)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_each_phase_runs_a_few_steps(make, preset):
    report = make(preset, size=Size(256, 256))
    steps = [stage["steps"] for stage in report.plan["stages"] if stage["kind"] == "denoise"]
    assert steps == [8, 3, 2]


def test_the_lora_is_merged_into_linear_attention_too(xl_model, lora):
    from linfusion_cli.models.adapters.lora import merge_lora

    unet = load_unet(Model(xl_model), torch.float32)
    linear = load_weights(xl_model / "linfusion", unet, torch.float32)
    before = {path: module.to_q.weight.clone() for path, module in linear.items()}
    merged = merge_lora(unet, linear, lora, 0.8)
    assert merged.linear_layers == 4 * len(linear)
    assert all((module.to_q.weight != before[path]).any() for path, module in linear.items())


def test_a_lora_changes_the_image_by_its_weight(make, tmp_path, lora):
    for name, loras in (("none", ()), ("zero", (f"{lora}:0",)), ("some", (f"{lora}:0.8",))):
        make("sdxl-lcm", output=f"{name}.png", lora=loras, size=Size(128, 128))
    none, zero, some = (
        np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("none", "zero", "some")
    )
    assert np.abs(none - zero).max() <= 1 and np.abs(none - some).max() > 1
