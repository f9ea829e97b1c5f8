"""--linfusion-merge, from the request to the file: merging a fine-tune's self-attention into the LinFusion weights."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from linfusion_cli.core.errors import DataError, Unavailable, UsageError
from linfusion_cli.core.events import Notice
from linfusion_cli.core.geometry import Size
from linfusion_cli.mixers.linear.merge import PROJECTIONS
from linfusion_cli.mixers.linear.weights import CONFIG_NAME, WEIGHTS_NAME, read_specs
from linfusion_cli.models.locate.model import FAMILY_BASES, PUBLISHED_LINFUSION
from linfusion_cli.run.inputs.resolve import resolve_request
from linfusion_cli.run.pipeline import generate
from linfusion_cli.run.stages.plan import plan_run
from tests.models.locate.test_model import add_to_hub_cache
from tests.support.fakes import Listener
from tests.support.requests import make_request
from tests.support.small_models import build_small_xl_unet, write_linfusion

UNET = "unet/diffusion_pytorch_model.safetensors"
PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def base(xl_model, tmp_path):
    """Write the base model of the small model: the same, with other self-attention weights."""
    folder = shutil.copytree(xl_model, tmp_path / "base")
    tensors, generator = load_file(folder / UNET), torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if ".attn1." in name:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / UNET)
    return folder


@pytest.fixture
def request_for(xl_model, tmp_path):
    """Return a function that builds a small request with linear attention."""

    def request(**changed):
        values = {"prompt": "a hill", "size": Size(64, 64), "model": str(xl_model), "steps": (2,)}
        values |= {"attention": ("linear",), "output": tmp_path / "out.png", "overwrite": True}
        return make_request(**values | changed)

    return request


@pytest.fixture
def generate_pixels(request_for):
    """Return a function that generates an image and returns its pixels, [H, W, 3] uint8."""

    def run(observer=None, **changed):
        request = request_for(**changed)
        generate(request, {}, observer or Listener())
        return np.asarray(Image.open(request.execution.output)).copy()

    return run


def write_merged_weights(folder, xl_model, base, method):
    """Write LinFusion weights that are already merged, by the formula of the method."""
    shutil.copytree(xl_model / "linfusion", folder)
    tensors, own, theirs = load_file(folder / WEIGHTS_NAME), load_file(xl_model / UNET), load_file(base / UNET)
    for place, spec in enumerate(read_specs(folder / CONFIG_NAME)):
        for name in PROJECTIONS:
            ours, path = own[f"{spec.module_name}.{name}"], f"{spec.module_name}.{name}"
            delta = tensors[f"{place}.{name}"] + ours - theirs[path]
            tensors[f"{place}.{name}"] = {"keep": ours.clone(), "delta": delta}[method]
    save_file(tensors, folder / WEIGHTS_NAME)
    return folder


def write_lora(folder):
    generator = torch.Generator().manual_seed(2)
    sides = {f"unet.{PATH}.{name}.lora_{side}.weight": shape for name in ("to_q", "to_v") for side, shape in
             (("A", (2, 16)), ("B", (16, 2)))}  # fmt: skip
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in sides.items()}
    save_file(tensors, folder / "lora.safetensors")
    return str(folder / "lora.safetensors")


@pytest.mark.parametrize("method", ["keep", "delta"])
def test_the_image_is_that_of_weights_merged_beforehand_with_loras_on_top(
    generate_pixels, xl_model, base, tmp_path, method
):
    beforehand, loras = write_merged_weights(tmp_path / "merged", xl_model, base, method), (write_lora(tmp_path),)
    found = generate_pixels(linfusion_merge=method, linfusion_base=str(base), lora=loras).astype(int)
    assert (
        np.abs(found - generate_pixels(linfusion=str(beforehand), linfusion_merge="published", lora=loras)).max() <= 1
    )
    assert np.abs(found - generate_pixels(linfusion_merge="published", lora=loras)).max() > 1
    assert np.abs(found - generate_pixels(linfusion_merge=method, linfusion_base=str(base))).max() > 1


def test_delta_of_the_base_itself_gives_the_published_weights(generate_pixels, xl_model):
    published = generate_pixels(linfusion_merge="published")
    for name in (str(xl_model), "auto"):  # weights in a model's folder were made for that model
        assert np.array_equal(generate_pixels(linfusion_merge="delta", linfusion_base=name), published)


@pytest.fixture
def tuned(xl_model, tmp_path):
    """Write the small model as a fine-tune without LinFusion weights; weights for its family are in the hub cache."""
    add_to_hub_cache(xl_model / "linfusion", PUBLISHED_LINFUSION["sdxl"])
    return str(shutil.copytree(xl_model, tmp_path / "tuned", ignore=shutil.ignore_patterns("linfusion")))


def notices_of(listener):
    return [event.text for event in listener.of(Notice) if "self-attention" in event.text]


def test_auto_adds_the_changes_if_the_base_is_installed(generate_pixels, tuned, base):
    listener = Listener()
    assert np.array_equal(
        generate_pixels(listener, model=tuned), generate_pixels(model=tuned, linfusion_merge="published")
    )
    assert ["not installed" in text for text in notices_of(listener)] == [True]
    add_to_hub_cache(base, FAMILY_BASES["sdxl"])
    listener = Listener()
    found = generate_pixels(listener, model=tuned)
    assert np.array_equal(found, generate_pixels(model=tuned, linfusion_merge="delta"))
    assert not np.array_equal(found, generate_pixels(model=tuned, linfusion_merge="published"))
    assert ["--linfusion-merge delta" in text for text in notices_of(listener)] == [True]


def test_auto_adds_nothing_if_the_weights_are_for_the_model(generate_pixels, tuned, base, xl_model):
    """For the base itself, for a model with its own weights, and for weights set with --linfusion."""
    snapshot = add_to_hub_cache(base, FAMILY_BASES["sdxl"])
    shutil.rmtree(snapshot / "linfusion")
    for model, more in ((snapshot, {}), (xl_model, {}), (tuned, {"linfusion": str(xl_model / "linfusion")})):
        listener = Listener()
        published = generate_pixels(model=str(model), linfusion_merge="published", **more)
        assert np.array_equal(generate_pixels(listener, model=str(model), **more), published)
        assert not notices_of(listener)


def test_auto_uses_a_base_that_is_set(generate_pixels, tuned, base):
    listener = Listener()
    found = generate_pixels(listener, model=tuned, linfusion_base=str(base))
    assert np.array_equal(found, generate_pixels(model=tuned, linfusion_merge="delta", linfusion_base=str(base)))
    assert ["--linfusion-merge delta" in text for text in notices_of(listener)] == [True]
    with pytest.raises(Unavailable, match="--linfusion-base someone/base"):
        generate_pixels(model=tuned, linfusion_base="someone/base")


def test_a_missing_base_is_refused_if_it_is_needed(generate_pixels, xl_model, tmp_path):
    linfusion = str(shutil.copytree(xl_model / "linfusion", tmp_path / "elsewhere"))
    with pytest.raises(Unavailable, match="--linfusion-base stabilityai/") as refused:
        generate_pixels(linfusion_merge="delta", linfusion=linfusion)
    assert refused.value.exit_code == 69 and "published or keep" in refused.value.hint
    generate_pixels(linfusion_merge="delta", linfusion=linfusion, attention=("original",))
    generate_pixels(linfusion_merge="delta", linfusion="none", attention=("auto",))


def test_an_incompatible_base_is_refused_by_the_plan(request_for, base):
    build_small_xl_unet((1, 1, 1)).save_pretrained(base / "unet")
    request = request_for(linfusion_merge="delta", linfusion_base=str(base))
    with pytest.raises(DataError, match=r"transformer_blocks\.1\.attn1\.to_q\.weight"):
        plan_run(resolve_request(request))


def test_a_model_with_fewer_layers_uses_the_weights_of_the_full_one(generate_pixels, xl_model, tmp_path):
    """As SSD-1B with the weights for SDXL: weights without a matching layer are ignored and reported."""
    weights = write_linfusion(tmp_path / "whole", build_small_xl_unet())
    model = shutil.copytree(xl_model, tmp_path / "cut")
    torch.manual_seed(0)
    build_small_xl_unet((1, 1, 1), mid_block_type=None).save_pretrained(model / "unet")
    listener = Listener()
    generate_pixels(listener, model=str(model), linfusion=str(weights))
    assert [event.text for event in listener.of(Notice) if str(weights) in event.text and "layers" in event.text]


@pytest.mark.parametrize(("setting", "value"), [("linfusion_merge", "sum"), ("linfusion_base", " ")])
def test_an_invalid_merge_or_base_is_a_usage_error(request_for, setting, value):
    with pytest.raises(UsageError) as refused:
        request_for(**{setting: value})
    assert refused.value.setting == setting
