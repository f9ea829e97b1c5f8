"""What a fine-tune's own attention does to the picture, from the request to the file."""

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
from linfusion_cli.settings.request import GenerateRequest
from tests.models.locate.test_model import put_in_hub
from tests.support.fakes import Listener
from tests.support.small_models import small_xl_unet, write_linfusion

UNET = "unet/diffusion_pytorch_model.safetensors"
PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture
def base(xl_model, tmp_path):
    """The model that the small model is taken to be a fine-tune of: its self-attention was another one."""
    folder = shutil.copytree(xl_model, tmp_path / "base")
    tensors, generator = load_file(folder / UNET), torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if ".attn1." in name:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / UNET)
    return folder


@pytest.fixture
def request_for(xl_model, tmp_path):
    def request(**changed):
        values = {"prompt": "a hill", "size": Size(64, 64), "model": str(xl_model), "steps": (2,)}
        values |= {"attention": ("linear",), "output": tmp_path / "out.png", "overwrite": True}
        return GenerateRequest(**values | changed)

    return request


@pytest.fixture
def paint(request_for):
    """The picture of a request, [H, W, 3] uint8."""

    def run(observer=None, **changed):
        request = request_for(**changed)
        generate(request, {}, observer or Listener())
        return np.asarray(Image.open(request.output)).copy()

    return run


def merged_weights(folder, xl_model, base, way):
    """LinFusion weights in which what a merge does was done before, by its plain formula."""
    shutil.copytree(xl_model / "linfusion", folder)
    tensors, own, theirs = load_file(folder / WEIGHTS_NAME), load_file(xl_model / UNET), load_file(base / UNET)
    for place, spec in enumerate(read_specs(folder / CONFIG_NAME)):
        for name in PROJECTIONS:
            ours, path = own[f"{spec.module_name}.{name}"], f"{spec.module_name}.{name}"
            delta = tensors[f"{place}.{name}"] + ours - theirs[path]
            tensors[f"{place}.{name}"] = {"keep": ours.clone(), "delta": delta}[way]
    save_file(tensors, folder / WEIGHTS_NAME)
    return folder


def a_lora(folder):
    generator = torch.Generator().manual_seed(2)
    sides = {f"unet.{PATH}.{name}.lora_{side}.weight": shape for name in ("to_q", "to_v") for side, shape in
             (("A", (2, 16)), ("B", (16, 2)))}  # fmt: skip
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in sides.items()}
    save_file(tensors, folder / "lora.safetensors")
    return str(folder / "lora.safetensors")


@pytest.mark.parametrize("way", ["keep", "delta"])
def test_the_image_is_that_of_weights_merged_beforehand_with_loras_on_top(paint, xl_model, base, tmp_path, way):
    beforehand, loras = merged_weights(tmp_path / "merged", xl_model, base, way), (a_lora(tmp_path),)
    found = paint(linfusion_merge=way, linfusion_base=str(base), lora=loras).astype(int)
    assert np.abs(found - paint(linfusion=str(beforehand), linfusion_merge="published", lora=loras)).max() <= 1
    assert np.abs(found - paint(linfusion_merge="published", lora=loras)).max() > 1
    assert np.abs(found - paint(linfusion_merge=way, linfusion_base=str(base))).max() > 1


def test_of_the_base_itself_delta_is_the_published_weights(paint, xl_model):
    published = paint(linfusion_merge="published")
    for name in (str(xl_model), "auto"):  # weights that lie in a model's folder were made for it
        assert np.array_equal(paint(linfusion_merge="delta", linfusion_base=name), published)


@pytest.fixture
def tuned(xl_model, tmp_path):
    """The small model as a fine-tune comes, without linear attention of its own; that is published for its family."""
    put_in_hub(xl_model / "linfusion", PUBLISHED_LINFUSION["sdxl"])
    return str(shutil.copytree(xl_model, tmp_path / "tuned", ignore=shutil.ignore_patterns("linfusion")))


def notices_of(listener):
    return [event.text for event in listener.of(Notice) if "self-attention" in event.text]


def test_by_itself_what_changed_is_heard_where_the_base_is_here(paint, tuned, base):
    heard = Listener()
    assert np.array_equal(paint(heard, model=tuned), paint(model=tuned, linfusion_merge="published"))
    assert ["is not heard" in text for text in notices_of(heard)] == [True]
    put_in_hub(base, FAMILY_BASES["sdxl"])
    heard = Listener()
    found = paint(heard, model=tuned)
    assert np.array_equal(found, paint(model=tuned, linfusion_merge="delta"))
    assert not np.array_equal(found, paint(model=tuned, linfusion_merge="published"))
    assert ["--linfusion-merge delta" in text for text in notices_of(heard)] == [True]


def test_by_itself_nothing_is_added_where_the_weights_are_for_the_model(paint, tuned, base, xl_model):
    """For the base itself, for a model with weights of its own, and for weights that were named."""
    snapshot = put_in_hub(base, FAMILY_BASES["sdxl"])
    shutil.rmtree(snapshot / "linfusion")
    for model, more in ((snapshot, {}), (xl_model, {}), (tuned, {"linfusion": str(xl_model / "linfusion")})):
        heard = Listener()
        published = paint(model=str(model), linfusion_merge="published", **more)
        assert np.array_equal(paint(heard, model=str(model), **more), published)
        assert not notices_of(heard)


def test_by_itself_a_base_that_was_named_is_meant(paint, tuned, base):
    heard = Listener()
    found = paint(heard, model=tuned, linfusion_base=str(base))
    assert np.array_equal(found, paint(model=tuned, linfusion_merge="delta", linfusion_base=str(base)))
    assert ["--linfusion-merge delta" in text for text in notices_of(heard)] == [True]
    with pytest.raises(Unavailable, match="--linfusion-base someone/base, is not on this machine"):
        paint(model=tuned, linfusion_base="someone/base")


def test_a_base_that_is_not_here_is_refused_where_it_is_needed(paint, xl_model, tmp_path):
    linfusion = str(shutil.copytree(xl_model / "linfusion", tmp_path / "elsewhere"))
    with pytest.raises(Unavailable, match="stabilityai/.*, is not on this machine") as refused:
        paint(linfusion_merge="delta", linfusion=linfusion)
    assert refused.value.exit_code == 69 and "published or keep" in refused.value.hint
    paint(linfusion_merge="delta", linfusion=linfusion, attention=("original",))
    paint(linfusion_merge="delta", linfusion="none", attention=("auto",))


def test_a_base_of_another_make_is_refused_by_the_plan_already(request_for, base):
    small_xl_unet((1, 1, 1)).save_pretrained(base / "unet")
    request = request_for(linfusion_merge="delta", linfusion_base=str(base))
    with pytest.raises(DataError, match=r"transformer_blocks.1.attn1.to_q.weight is no such tensor in the base"):
        plan_run(resolve_request(request))


def test_a_model_that_was_cut_down_uses_the_weights_of_the_whole_one(paint, xl_model, tmp_path):
    """As SSD-1B does SDXL's: what it has no layer for is left unused, and told."""
    whole = write_linfusion(tmp_path / "whole", small_xl_unet())
    model = shutil.copytree(xl_model, tmp_path / "cut")
    torch.manual_seed(0)
    small_xl_unet((1, 1, 1), mid_block_type=None).save_pretrained(model / "unet")
    heard = Listener()
    paint(heard, model=str(model), linfusion=str(whole))
    assert [event.text for event in heard.of(Notice) if "are not in this smaller model" in event.text]


@pytest.mark.parametrize(("setting", "value"), [("linfusion_merge", "sum"), ("linfusion_base", " ")])
def test_what_is_no_merge_and_no_base_is_usage(request_for, setting, value):
    with pytest.raises(UsageError) as refused:
        request_for(**{setting: value})
    assert refused.value.setting == setting
