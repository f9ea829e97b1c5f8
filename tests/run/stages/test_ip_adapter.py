"""IP-Adapters: the base matches diffusers, and the image prompt affects all phases."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from linfusion_cli.core.errors import DataError, InputNotFound, Unavailable, UsageError
from linfusion_cli.core.events import StageStarted
from linfusion_cli.core.geometry import Size
from linfusion_cli.images.read.source import inspect_source
from linfusion_cli.run.inputs import ip_adapters
from linfusion_cli.run.pipeline import generate
from linfusion_cli.run.stages import predictors
from linfusion_cli.unet.predict import WholeUNet
from tests.models.adapters.test_lora import build_factors, find_layers, to_peft_layout, write_lora
from tests.support.fakes import Listener
from tests.support.requests import make_request
from tests.support.small_ip_adapters import write_adapter, write_encoder, write_image
from tests.support.small_models import build_small_sd_unet, build_small_xl_unet

UNETS = {"xl": build_small_xl_unet, "sd": build_small_sd_unet}
PIPELINES = {"xl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Write adapters of every kind for both families, their image encoder and two images to a folder."""
    folder = tmp_path_factory.mktemp("adapters")
    write_encoder(folder / "image_encoder")
    for family, make in UNETS.items():
        for seed, kind in enumerate(("plain", "plus", "full")):
            write_adapter(folder / f"{family}-{kind}.safetensors", make(), kind, seed)
    write_image(folder / "a.png")
    write_image(folder / "b.png", seed=4, width=33, height=70)
    return folder


@pytest.fixture
def models(xl_model, sd_model):
    """Return the folders of the small models by family."""
    return {"xl": xl_model, "sd": sd_model}


@pytest.fixture
def make(models, adapters, tmp_path):
    """Return a function that calls generate() with adapters of these kinds, one image each, and returns the pixels."""

    def run(*kinds, family="xl", images=("a.png", "b.png"), observer=None, **changed):
        named = {"ip_adapter": tuple(str(adapters / f"{family}-{kind}.safetensors") for kind in kinds)}
        named |= {"ip_image": tuple(str(adapters / image) for image in images[: len(kinds)])}
        values = {"prompt": "a hill", "size": Size(64, 64), "model": str(models[family]), "steps": (3,), **named}
        values |= {"output": tmp_path / "out.png", "overwrite": True} | changed
        generate(make_request(**values), {}, observer or Listener())
        return np.asarray(Image.open(tmp_path / "out.png")).astype(int)

    return run


@pytest.mark.parametrize(
    ("family", "kinds", "guidance"),
    [
        ("xl", ("plain",), 4.0),
        ("xl", ("plus",), 4.0),
        ("xl", ("full", "plain"), 1.0),
        ("sd", ("plain",), 1.0),
        ("sd", ("plus", "plain"), 4.0),
        ("sd", ("full",), 4.0),
    ],
)
def test_the_base_matches_diffusers(make, models, adapters, phases, family, kinds, guidance):
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
    assert (phases[-1][1].latents - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_image_prompt_affects_every_phase(make):
    """The base runs whole, the large phase in strips with linear attention; only the image prompt differs."""
    upscaling = {"size": Size(96, 96), "strength": (0.7,)}
    one, other = make("plain", **upscaling), make("plain", images=("b.png",), **upscaling)
    assert one.shape == (96, 96, 3) and np.abs(one - other).mean() > 1
    assert not np.array_equal(one, make("plain", ip_scale=(0.2,), **upscaling))


def test_strips_match_the_whole_forward(make, monkeypatch):
    kinds = ("plus", "plain")
    settings = {"attention": ("linear",), "size": Size(120, 104), "upscaler": "demofusion", "strength": (0.7,)}
    strips = make(*kinds, **settings)
    monkeypatch.setattr(
        predictors,
        "build_runners",
        lambda run, unet, strategy, phase, _: [WholeUNet(unet), WholeUNet(unet, phase.dilation)],
    )
    assert np.abs(strips - make(*kinds, **settings)).max() <= 1


def test_both_halves_of_guidance_in_one_batch_give_the_same_image(make, monkeypatch):
    in_sequence = make("plus", "plain", family="sd", linfusion="none")
    real = predictors.guide_prediction
    monkeypatch.setattr(
        predictors,
        "guide_prediction",
        lambda run, conditioning, unet, _, guidance: real(run, conditioning, unet, True, guidance),
    )
    assert np.abs(in_sequence - make("plus", "plain", family="sd", linfusion="none")).max() <= 1


def test_orientation_is_applied_and_transparency_becomes_white(adapters, tmp_path):
    """The EXIF orientation is applied, and transparent parts become white."""

    def read(name):
        return np.asarray(ip_adapters.read_image(inspect_source(tmp_path / name), notices.append))

    notices, original = [], Image.open(adapters / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    original.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read("turned.png"), original)
    clear = original.convert("RGBA")
    clear.paste((9, 99, 199, 0), (0, 0, 30, 30))
    clear.save(tmp_path / "clear.png")
    original.paste((255, 255, 255), (0, 0, 30, 30))
    assert np.array_equal(read("clear.png"), original)
    tall = np.random.default_rng(0).integers(0, 256, (700, 3, 3), np.uint8)  # more rows than one read returns
    Image.fromarray(tall).save(tmp_path / "tall.png")
    assert np.array_equal(read("tall.png"), tall) and not notices


def test_a_lora_and_an_adapter_together_match_diffusers(make, models, adapters, phases, tmp_path):
    lora = write_lora(tmp_path, to_peft_layout(build_factors(find_layers(build_small_sd_unet(), "attn"))))
    make("plain", family="sd", linfusion="none", lora=(str(lora),))
    pipeline = StableDiffusionPipeline.from_pretrained(models["sd"])
    pipeline.load_lora_weights(str(lora))
    pipeline.load_ip_adapter(str(adapters), "", "sd-plain.safetensors")
    expected = pipeline(
        "a hill",
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=5.0,
        ip_adapter_image=Image.open(adapters / "a.png"),
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="latent",
    ).images
    assert (phases[-1][1].latents - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_preprocessor_config_of_the_encoder_is_used(make, adapters, tmp_path):
    folder = shutil.copytree(adapters / "image_encoder", tmp_path / "encoder")
    plain = make("plain", ip_image_encoder=str(folder))
    assert np.array_equal(plain, make("plain"))
    config = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    assert not np.array_equal(plain, make("plain", ip_image_encoder=str(folder)))
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(DataError, match=r"preprocessor_config\.json"):
        make("plain", ip_image_encoder=str(folder))


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"images": ()}, UsageError, "--ip-image.*--ip-adapter"),
        ({"images": ("c.png",)}, InputNotFound, r"c\.png"),
        ({"images": ("xl-plain.safetensors",)}, DataError, r"xl-plain\.safetensors"),
        ({"ip_adapter": ("/nowhere/a.safetensors",)}, Unavailable, r"/nowhere/a\.safetensors"),
        ({"ip_image_encoder": "/nowhere"}, Unavailable, "--ip-image-encoder /nowhere"),
    ],
)
def test_wrong_input_ends_it_before_any_work(make, tmp_path, changed, error, says):
    listener = Listener()
    with pytest.raises(error, match=says):
        make("plain", observer=listener, **changed)
    assert len(listener.of(StageStarted)) <= 1 and not (tmp_path / "out.png").exists()


def test_an_adapter_of_another_family_is_refused_before_anything_loads(make, adapters):
    listener = Listener()
    with pytest.raises(DataError, match=r"ip_adapter\.1\.to_k_ip\.weight.*\(8, 16\).*\(16, 32\)"):
        make("plain", ip_adapter=(str(adapters / "sd-plain.safetensors"),), observer=listener)
    assert [event.kind for event in listener.of(StageStarted)] == ["resolve", "plan"]


def test_a_huge_image_is_refused(make, adapters, monkeypatch):
    monkeypatch.setattr(ip_adapters, "MAX_IMAGE_PX", 50 * 41 - 1)
    with pytest.raises(DataError, match=r"a\.png.*50x41"):
        make("plain")
