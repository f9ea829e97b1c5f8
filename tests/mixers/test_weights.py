import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from linfusion_cli.core.errors import DataError, InputNotFound
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions
from linfusion_cli.mixers.linear.weights import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    build_meta_modules,
    count_unused_modules,
    load_weights,
    save_weights,
)
from tests.support.small_models import build_small_xl_unet, write_linfusion
from tools.bench.shapes import build_sdxl_unet


def build_meta_sdxl_unet() -> UNet2DConditionModel:
    """Build the UNet of stabilityai/stable-diffusion-xl-base-1.0 on the meta device."""
    with torch.device("meta"):
        return build_sdxl_unet()


def write_published_layout(folder, unet):
    """Write config and tensors with the names and shapes of the published LinFusion-XL."""
    generator = torch.Generator().manual_seed(0)
    entries, tensors = [], {}
    for i, (path, old) in enumerate(find_self_attentions(unet).items()):
        dim = old.to_q.in_features
        mid = dim // 16
        entries.append({"module_name": path, "dim_n": dim, "heads": old.heads, "projection_mid_dim": mid})
        square = torch.randn(dim, dim, generator=generator).half()
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            tensors[f"{i}.{name}.weight"] = square.roll(len(tensors), 0)
        for name in ("to_q_.0", "to_k_.0"):
            tensors[f"{i}.{name}.weight"] = square.roll(len(tensors), 0)[:mid].clone()
        for name in ("to_q_.3", "to_k_.3"):
            tensors[f"{i}.{name}.weight"] = square.roll(len(tensors), 0)[:, :mid].clone()
        for name in ("to_out.0", "to_q_.3", "to_k_.3"):
            tensors[f"{i}.{name}.bias"] = square[len(tensors) % dim].clone()
        for name in ("to_q_.0", "to_q_.1", "to_k_.0", "to_k_.1"):
            tensors[f"{i}.{name}.bias"] = square[len(tensors) % dim, :mid].clone()
        for name in ("to_q_.1", "to_k_.1"):
            tensors[f"{i}.{name}.weight"] = square[0, :mid].clone()
    save_file(tensors, folder / WEIGHTS_NAME)
    config = {"_class_name": "LinFusion", "_diffusers_version": "0.27.0", "modules_list": entries}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return tensors


@pytest.mark.slow
def test_sdxls_seventy_modules_are_read(tmp_path):
    unet = build_meta_sdxl_unet()
    tensors = write_published_layout(tmp_path, unet)
    modules = load_weights(tmp_path, unet, torch.float16)
    assert len(modules) == 70 and list(modules) == list(find_self_attentions(unet))
    for i, module in enumerate(modules.values()):
        assert module.heads * 64 == module.to_q.in_features
        assert torch.equal(module.to_q.weight, tensors[f"{i}.to_q.weight"])
        assert torch.equal(module.to_k_[3].bias, tensors[f"{i}.to_k_.3.bias"])


@pytest.fixture
def unet():
    return build_small_xl_unet()


@pytest.fixture
def weights(tmp_path, unet):
    return write_linfusion(tmp_path / "linfusion", unet)


def rewrite(weights, change):
    tensors = load_file(weights / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, weights / WEIGHTS_NAME)


@pytest.mark.parametrize("mid_dim", [None, -1, 6])
def test_round_trip(tmp_path, unet, mid_dim):
    modules = {
        p: LinearAttention(old.to_q.in_features, old.heads, mid_dim) for p, old in find_self_attentions(unet).items()
    }
    save_weights(tmp_path, modules, torch.float32)
    again = load_weights(tmp_path, unet, torch.float32)
    for path, module in modules.items():
        for name, tensor in module.state_dict().items():
            assert torch.equal(again[path].state_dict()[name], tensor)


@pytest.mark.parametrize("middle", [None, "UNetMidBlock2D"])
def test_a_unet_that_was_cut_down_takes_what_it_has_a_place_for(weights, unet, middle):
    """Like SSD-1B: SDXL with fewer transformer blocks, and without self-attention in the mid block."""
    small = build_small_xl_unet((1, 1, 1), mid_block_type=middle)
    modules, tensors = load_weights(weights, small, torch.float32), load_file(weights / WEIGHTS_NAME)
    assert list(modules) == list(build_meta_modules(weights, small)) == list(find_self_attentions(small))
    places = {path: i for i, path in enumerate(find_self_attentions(unet))}
    for path, module in modules.items():
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, tensors[f"{places[path]}.{name}"])
    assert 0 < len(modules) < len(places) and list(places)[: len(modules)] != list(modules)
    assert (
        count_unused_modules(weights, small) == len(places) - len(modules) and count_unused_modules(weights, unet) == 0
    )


def test_weights_that_lack_a_layer_name_it(tmp_path, unet):
    cut = write_linfusion(tmp_path / "cut", build_small_xl_unet((1, 1, 1)))
    first = "down_blocks.2.attentions.0.transformer_blocks.1.attn1"
    with pytest.raises(DataError, match=f"{first} has no such layer in the weights and 16 channels in 2 heads in the"):
        load_weights(cut, unet, torch.float32)


def test_a_layer_of_another_shape_is_named_with_both(weights):
    wider = build_small_xl_unet((1, 1, 1), heads=(1, 4, 4))
    first = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    shapes = "16 channels in 2 heads in the weights and 16 channels in 4 heads in the model"
    with pytest.raises(DataError, match=f"{first} has {shapes}"):
        load_weights(weights, wider, torch.float32)


def test_a_missing_tensor_is_named(weights, unet):
    rewrite(weights, lambda tensors: tensors.pop("3.to_k_.0.bias"))
    with pytest.raises(DataError, match=r"3\.to_k_\.0\.bias is no such tensor in the file"):
        load_weights(weights, unet, torch.float32)


def test_a_tensor_of_another_shape_is_named(weights, unet):
    rewrite(weights, lambda tensors: tensors.update({"1.to_v.weight": torch.zeros(3, 16)}))
    with pytest.raises(DataError, match=r"1\.to_v\.weight is \(3, 16\) in the file and \(16, 16\) in the model"):
        load_weights(weights, unet, torch.float32)


def test_a_tensor_too_many_is_named(weights, unet):
    rewrite(weights, lambda tensors: tensors.update({"99.to_q.weight": torch.zeros(1)}))
    with pytest.raises(DataError, match=r"99\.to_q\.weight"):
        load_weights(weights, unet, torch.float32)


def test_weights_of_another_model_name_the_first_layer(weights):
    other = build_meta_sdxl_unet()
    with pytest.raises(DataError, match=r"down_blocks\.1\.attentions\.0\.transformer_blocks\.0\.attn1 has 16 channels"):
        load_weights(weights, other, torch.float32)


def test_a_damaged_file_is_refused(weights, unet):
    file = weights / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=WEIGHTS_NAME):
        load_weights(weights, unet, torch.float32)


@pytest.mark.parametrize("text", ["", "[]", '{"modules_list": 3}', '{"modules_list": [{"dim_n": 3}]}', '{"other": []}'])
def test_a_config_of_another_kind_is_refused(weights, unet, text):
    (weights / CONFIG_NAME).write_text(text)
    with pytest.raises(DataError, match="not a LinFusion config"):
        load_weights(weights, unet, torch.float32)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_is_named(weights, unet, name):
    (weights / name).unlink()
    with pytest.raises(InputNotFound, match=name):
        load_weights(weights, unet, torch.float32)
