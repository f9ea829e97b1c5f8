"""A picture painted with IP-Adapters is the one that diffusers paints, and in large phases it is heard too."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from linfusion_cli.errors import DataError, InputMissing, Unavailable, UsageError
from linfusion_cli.geometry import Size
from linfusion_cli.jobs import paint
from linfusion_cli.jobs.generate import generate
from linfusion_cli.request import GenerateRequest
from tests.fakes import Listener
from tests.ip_in_small import write_adapter, write_encoder, write_picture
from tests.models_in_small import small_sd_unet, small_xl_unet

UNETS = {"xl": small_xl_unet, "sd": small_sd_unet}
PIPELINES = {"xl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder with adapters of every kind for both families, their encoder, and two pictures."""
    folder = tmp_path_factory.mktemp("adapters")
    write_encoder(folder / "image_encoder")
    for family, make in UNETS.items():
        for seed, kind in enumerate(("plain", "plus", "full")):
            write_adapter(folder / f"{family}-{kind}.safetensors", make(), kind, seed)
    write_picture(folder / "a.png")
    write_picture(folder / "b.png", seed=4, width=33, height=70)
    return folder


@pytest.fixture
def models(xl_model, sd_model):
    return {"xl": xl_model, "sd": sd_model}


@pytest.fixture
def make(models, adapters, tmp_path):
    """generate() with the adapters of these kinds, the first of which listens to the first picture; its pixels."""

    def run(*kinds, family="xl", images=("a.png", "b.png"), observer=None, **changed):
        named = {"ip_adapter": tuple(str(adapters / f"{family}-{kind}.safetensors") for kind in kinds)}
        named |= {"ip_image": tuple(str(adapters / image) for image in images[: len(kinds)])}
        values = {"prompt": "a hill", "size": Size(64, 64), "model": str(models[family]), "steps": (3,), **named}
        values |= {"output": tmp_path / "out.png", "overwrite": True} | changed
        generate(GenerateRequest(**values), {}, observer or Listener())
        return np.asarray(Image.open(tmp_path / "out.png")).astype(int)

    return run


@pytest.fixture
def latents(monkeypatch):
    """The latents of the last phase that was denoised."""
    seen, plain = [], paint.stepped
    monkeypatch.setattr(paint, "stepped", lambda *given: seen.append(plain(*given)) or seen[-1])
    return seen


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("kinds", [("plain",), ("plus",), ("full",), ("plus", "plain")], ids="+".join)
@pytest.mark.parametrize("family", ["xl", "sd"])
def test_the_base_is_what_diffusers_makes(make, models, adapters, latents, family, kinds, guidance):
    make(*kinds, family=family, linfusion="none", guidance_scale=(guidance,), ip_scale=(0.7, 0.4)[: len(kinds)], seed=5)
    pipeline = PIPELINES[family].from_pretrained(models[family])
    names = [f"{family}-{kind}.safetensors" for kind in kinds]
    pipeline.load_ip_adapter(str(adapters), "", names)
    pipeline.set_ip_adapter_scale([0.7, 0.4][: len(kinds)])
    expected = pipeline(
        "a hill",
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=guidance,
        ip_adapter_image=[Image.open(adapters / image) for image in ("a.png", "b.png")[: len(kinds)]],
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="latent",
    ).images
    assert (latents[-1] - expected).abs().max() <= 1e-5 * expected.abs().max()
