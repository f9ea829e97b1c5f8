"""ControlNets are located; missing ones, other models and mismatches are reported."""

import json
import shutil

import pytest
import torch
from diffusers import ControlNetUnionModel

from linfusion_cli.core.errors import DataError, Unavailable, UsageError
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.load.controlnet import LoadedControlNet
from linfusion_cli.models.locate.controlnet import check_fits, find_controlnet, is_union, parse_control_type
from tests.support.small_controlnets import build_small_controlnet, build_small_union_controlnet, write_controlnet
from tests.support.small_models import build_small_sd_unet, build_small_xl_unet


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_controlnet(tmp_path_factory.mktemp("plain"), build_small_controlnet(build_small_xl_unet()))


@pytest.fixture(scope="module")
def union(tmp_path_factory):
    return write_controlnet(tmp_path_factory.mktemp("union"), build_small_union_controlnet(build_small_xl_unet()))


@pytest.fixture
def change_config(plain, tmp_path):
    """Return a function that copies a ControlNet with other entries in its config."""

    def make(**entries):
        folder = shutil.copytree(plain, tmp_path / "changed")
        config = json.loads((folder / "config.json").read_text()) | entries
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def test_a_folder_is_located_and_its_class_detected(plain, union):
    assert find_controlnet(str(plain)) == plain
    assert (is_union(plain), is_union(union)) == (False, True)


@pytest.mark.parametrize("kind", ["plain", "union"])
def test_a_controlnet_is_loaded_as_it_was_written(kind, request, xl_model):
    folder = request.getfixturevalue(kind)
    check_fits(folder, Model(xl_model))
    loaded = LoadedControlNet.load(folder, {}, torch.float32)
    expected = (build_small_union_controlnet if kind == "union" else build_small_controlnet)(
        build_small_xl_unet()
    ).state_dict()
    meta = LoadedControlNet.load_meta(folder, {})
    assert {name: part.shape for name, part in meta.net.state_dict().items()} == {
        name: part.shape for name, part in expected.items()
    }
    assert type(loaded.net) is type(meta.net) and not loaded.net.training


def test_a_union_model_under_the_name_that_its_makers_gave_it(union, tmp_path, xl_model):
    folder = shutil.copytree(union, tmp_path / "union")
    config = json.loads((folder / "config.json").read_text()) | {"_class_name": "ControlNetModel_Union"}
    (folder / "config.json").write_text(json.dumps(config))
    check_fits(folder, Model(xl_model))
    assert is_union(folder) and type(LoadedControlNet.load(folder, {}, torch.float32).net) is ControlNetUnionModel


def test_a_missing_controlnet_is_unavailable(tmp_path):
    with pytest.raises(Unavailable, match="--controlnet lllyasviel/nothing"):
        find_controlnet("lllyasviel/nothing")
    with pytest.raises(DataError, match="no config.json"):
        find_controlnet(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Unavailable, match="is incomplete: .* has no weights"):
        find_controlnet(str(tmp_path))
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(DataError, match="is a pickle"):
        find_controlnet(str(tmp_path))
    (tmp_path / "net.safetensors").touch()
    with pytest.raises(DataError, match="is a file"):
        find_controlnet(str(tmp_path / "net.safetensors"))


def test_a_model_of_another_kind_is_no_controlnet(xl_model):
    with pytest.raises(DataError, match="not a ControlNet.*UNet2DConditionModel"):
        is_union(xl_model / "unet")


def test_one_for_another_family_is_refused(tmp_path, xl_model, sd_model, plain):
    other = write_controlnet(tmp_path, build_small_controlnet(build_small_sd_unet()))
    with pytest.raises(DataError, match=r"block_out_channels is \[8, 8, 16, 16\], .*\[8, 16, 16\]"):
        check_fits(other, Model(xl_model))
    with pytest.raises(DataError, match="does not fit the model"):
        check_fits(plain, Model(sd_model))
    check_fits(other, Model(sd_model))


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("cross_attention_dim", 999, "cross_attention_dim is 999, .*32"),
        ("in_channels", 9, "in_channels is 9, .*4"),
        ("conditioning_embedding_out_channels", [4, 8], "pixels per latent is 2, .*8"),
        ("global_pool_conditions", True, "global_pool_conditions True"),
        ("conditioning_channels", 4, "conditioning_channels 4"),
    ],
)
def test_the_mismatch_is_named(change_config, xl_model, name, value, named):
    with pytest.raises(DataError, match=named) as caught:
        check_fits(change_config(**{name: value}), Model(xl_model))
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("text", "number"),
    [("openpose", 0), ("Depth", 1), ("scribble", 2), ("mlsd", 3), ("anime-lineart", 3), ("5", 5), ("seg", 5)],
)
def test_kinds_of_images_have_names_and_numbers(union, text, number):
    assert parse_control_type(union, text) == number


@pytest.mark.parametrize("text", ["tile", "6", "inpaint", "-1", "edges", ""])
def test_a_kind_that_a_model_does_not_know_is_usage(union, text):
    with pytest.raises(UsageError, match="--control-type") as caught:
        parse_control_type(union, text)
    assert caught.value.setting == "control_type" and "segment, or 0 to 5" in caught.value.hint
