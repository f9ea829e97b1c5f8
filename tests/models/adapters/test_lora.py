"""A UNet with a merged LoRA predicts the same as in diffusers, for all file layouts."""

import copy
import json
import math

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors.torch import save_file
from torch import nn

from linfusion_cli.core.errors import DataError
from linfusion_cli.mixers.linear.mount import find_self_attentions, mount_modules
from linfusion_cli.mixers.linear.weights import load_weights
from linfusion_cli.models.adapters.lora import MergeCounts, build_layer_paths, merge_lora, normalize_layer_name
from linfusion_cli.models.locate.files import find_lora
from tests.mixers.test_weights import build_meta_sdxl_unet
from tests.support.small_models import build_small_sd_unet, build_small_xl_unet, write_linfusion

RANK = 3
FACTOR_SCALE = 1.0  # large enough that an ignored LoRA fails the comparison


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return build_small_xl_unet().eval().requires_grad_(False)


def find_layers(unet, *kinds):
    """Return path to layer of all linear layers and convolutions with one of `kinds` in the path."""
    modules = {path: layer for path, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    return {path: layer for path, layer in modules.items() if not kinds or any(kind in path for kind in kinds)}


def build_factors(layers, rank=RANK, seed=1):
    """Return path to random (down, up) of each layer."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return FACTOR_SCALE * torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))

    def factors(weight):
        return random(rank, *weight.shape[1:]), random(weight.shape[0], rank, *(1 for _ in weight.shape[2:]))

    return {path: factors(layer.weight) for path, layer in layers.items()}


def to_peft_layout(factors):
    names = {"lora_A": 0, "lora_B": 1}
    return {f"unet.{path}.{name}.weight": pair[i] for path, pair in factors.items() for name, i in names.items()}


def to_diffusers_layout(factors):
    names = {"down": 0, "up": 1}
    return {f"unet.{path}.lora.{name}.weight": pair[i] for path, pair in factors.items() for name, i in names.items()}


def to_kohya_layout(factors, names=None, alpha=2.0):
    """Return the tensors of a kohya-ss file; `names` maps paths to other layer names, with underscores."""
    tensors = {}
    for path, (down, up) in factors.items():
        name = (names or {}).get(path, path.replace(".", "_"))
        tensors |= {f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up}
        tensors |= {f"lora_unet_{name}.alpha": torch.tensor(alpha)}
    return tensors


def map_original_names(unet):
    """Return path to name in the original SDXL code, with underscores."""
    return {path: name for name, path in build_layer_paths(unet).items() if name != path.replace(".", "_")}


def write_lora(folder, tensors, **header):
    """Write `tensors` to a LoRA file."""
    file = folder / "lora.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt", **header})
    return file


def predict(unet):
    """Return the prediction of the UNet for fixed noise."""
    generator = torch.Generator().manual_seed(7)
    sample, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 32)))
    added = {"text_embeds": torch.randn(2, 16, generator=generator), "time_ids": torch.full((2, 6), 64.0)}
    with torch.no_grad():
        return unet(sample, 500, text, added_cond_kwargs=added).sample


def merge_with_diffusers(unet, tensors, weight=1.0, metadata=None):
    """Return a copy of `unet` with the LoRA loaded and fused by diffusers."""
    unet = copy.deepcopy(unet)
    state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(tensors), unet_config=unet.config)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name="test", metadata=metadata)
    unet.set_adapters(["test"], [weight])
    unet.fuse_lora()
    return unet


def assert_same(result, expected, before):
    """Check that `result` equals `expected` to 1e-5 and differs from `before`, the result without LoRA."""
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert (result - before).abs().max() > 0.01


@pytest.mark.parametrize("layout", [to_peft_layout, to_diffusers_layout, to_kohya_layout])
def test_every_layer_gets_a_lora_as_in_diffusers(unet, tmp_path, layout):
    # Without add_embedding: the converter of diffusers does not know its kohya-ss name.
    tensors = layout(build_factors(find_layers(unet, "_blocks", "mid_block", "conv_", "time_embedding")))
    before, expected = predict(unet), predict(merge_with_diffusers(unet, tensors, 0.7))
    merged = merge_lora(unet, {}, write_lora(tmp_path, tensors), 0.7)
    assert_same(predict(unet), expected, before)
    assert merged == MergeCounts(len(find_layers(unet)) - 2, 0)


def test_the_original_names_of_sdxl_are_read_as_in_diffusers(unet, tmp_path):
    tensors = to_kohya_layout(build_factors(find_layers(unet)), map_original_names(unet))
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_out_0.lora_up.weight" in tensors
    assert not any("down_blocks" in name for name in tensors)
    before, expected = predict(unet), predict(merge_with_diffusers(unet, tensors))
    merge_lora(unet, {}, write_lora(tmp_path, tensors), 1.0)
    assert_same(predict(unet), expected, before)


def test_the_original_names_of_the_real_sdxl_are_those_of_diffusers_converter():
    unet = build_meta_sdxl_unet()
    names = map_original_names(unet)
    assert names.keys() == find_layers(unet).keys()
    one = torch.zeros(1, 1)
    tensors = to_kohya_layout(dict.fromkeys(names, (one, one)), names)
    for path, name in names.items():  # identifies the layer after the conversion
        tensors[f"lora_unet_{name}.lora_down.weight"] = path
    state, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(tensors, unet_config=unet.config)
    converted = convert_unet_state_dict_to_peft(state)
    result = {value: key for key, value in converted.items() if isinstance(value, str)}
    assert result == {path: f"unet.{path}.lora_A.weight" for path in names}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_ff_net_0_proj", "down_blocks.1.attentions.0"),
        ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_middle_block_2_in_layers_2", "mid_block.resnets.1.conv1"),
        ("lora_unet_output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_8_0_skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
        ("lora_unet_add_embedding_linear_1", "add_embedding.linear_1"),
        ("diffusion_model.label_emb.0.2", "add_embedding.linear_2"),
        ("diffusion_model.middle_block.1.proj_in", "mid_block.attentions.0.proj_in"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out", "down_blocks.1"),
    ],
)
def test_names_lead_to_layers_of_sdxl(name, path):
    assert build_layer_paths(build_meta_sdxl_unet())[normalize_layer_name(name)].startswith(path)


def test_no_two_layers_of_sdxl_share_a_name():
    unet = build_meta_sdxl_unet()
    assert len(build_layer_paths(unet)) == 2 * len(find_layers(unet))


def test_a_layer_under_both_names_is_applied_once(unet, tmp_path):
    layers = find_layers(unet, "attn1")
    own, other = build_factors(layers), build_factors(layers, seed=2)
    both = to_kohya_layout(own) | to_kohya_layout(other, map_original_names(unet))
    before, expected = predict(unet), predict(merge_with_diffusers(unet, both))
    merge_lora(unet, {}, write_lora(tmp_path, both), 1.0)
    assert_same(predict(unet), expected, before)


def test_diffusers_old_layout_is_read(unet, tmp_path):
    factors = build_factors(find_layers(unet, "attn1", "attn2"))
    tensors = {}
    for path, (down, up) in factors.items():
        attention, _, layer = path.removesuffix(".0").rpartition(".")
        tensors |= {f"unet.{attention}.processor.{layer}_lora.down.weight": down}
        tensors |= {f"unet.{attention}.processor.{layer}_lora.up.weight": up}
    before, expected = predict(unet), predict(merge_with_diffusers(unet, tensors))
    merge_lora(unet, {}, write_lora(tmp_path, tensors), 1.0)
    assert_same(predict(unet), expected, before)


def test_ranks_and_alphas_of_each_layer_count(unet, tmp_path):
    attention, convolutions = (
        build_factors(find_layers(unet, "attn2"), 4),
        build_factors(find_layers(unet, "resnets"), 2),
    )
    tensors = to_kohya_layout(attention, alpha=1.0) | to_kohya_layout(convolutions, alpha=8.0)
    before, expected = predict(unet), predict(merge_with_diffusers(unet, tensors))
    merge_lora(unet, {}, write_lora(tmp_path, tensors), 1.0)
    assert_same(predict(unet), expected, before)


@pytest.mark.parametrize("alpha", [torch.tensor(2.0), torch.tensor(2), torch.tensor([2.0]).half()])
def test_an_alpha_in_diffusers_layout_counts(unet, tmp_path, alpha):
    factors = build_factors(find_layers(unet, "attn1"))
    tensors = to_peft_layout(factors) | {f"unet.{path}.alpha": alpha for path in factors}
    before, expected = predict(unet), predict(merge_with_diffusers(unet, to_kohya_layout(factors)))
    merge_lora(unet, {}, write_lora(tmp_path, tensors), 1.0)
    assert_same(predict(unet), expected, before)


@pytest.mark.parametrize("by_root", [False, True])
def test_alphas_in_diffusers_header_count(unet, tmp_path, by_root):
    factors = build_factors(find_layers(unet, "attn1", "attn2"))
    patterns = {"attn2.to_k": 1.5, "^mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 9}
    config = {"r": RANK, "lora_alpha": 6, "alpha_pattern": patterns, "use_rslora": by_root}
    config["target_modules"] = sorted(factors)
    header = json.dumps(add_unet_prefix(config) | {"text_encoder.lora_alpha": "?"})
    tensors = to_peft_layout(factors)
    before, expected = predict(unet), predict(merge_with_diffusers(unet, tensors, metadata=add_unet_prefix(config)))
    merge_lora(unet, {}, write_lora(tmp_path, tensors, lora_adapter_metadata=header), 1.0)
    assert_same(predict(unet), expected, before)


def add_unet_prefix(config):
    return {f"unet.{key}": value for key, value in config.items()}


def test_a_lora_saved_by_diffusers_is_read(xl_model, tmp_path):
    """Save with the pipeline of diffusers, with metadata."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_model)
    plain = copy.deepcopy(pipeline.unet)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_k", "to_out.0", "conv1"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    layers, metadata = get_peft_model_state_dict(pipeline.unet), {"r": 4, "lora_alpha": 2}
    metadata["target_modules"] = sorted(config.target_modules)
    pipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=metadata)
    before, expected = predict(plain), predict(pipeline.unet)
    merge_lora(plain, {}, find_lora(str(tmp_path)), 1.0)
    assert_same(predict(plain), expected, before)


def test_linear_and_original_attention_get_the_same_lora(unet, tmp_path):
    linear = load_weights(write_linfusion(tmp_path / "linfusion", unet), unet, torch.float32)
    tensors = to_peft_layout(build_factors(find_layers(unet, "attn1", "ff")))
    original = copy.deepcopy(unet)
    expected_unet, expected_linear = copy.deepcopy(unet), copy.deepcopy(linear)
    with mount_modules(expected_unet, expected_linear):
        before = predict(expected_unet)
        expected_unet.load_lora_adapter(tensors, prefix="unet", adapter_name="test")
        expected = predict(expected_unet)
    merged = merge_lora(unet, linear, write_lora(tmp_path, tensors), 1.0)
    with mount_modules(unet, linear):
        assert_same(predict(unet), expected, before)
    assert_same(predict(unet), predict(merge_with_diffusers(original, tensors)), predict(original))
    assert merged.linear_layers == 4 * len(find_self_attentions(unet)) < merged.layers


def test_weights_scale_and_two_loras_add_up(unet, tmp_path):
    first, second = (build_factors(find_layers(unet, "attn1"), seed=seed) for seed in (1, 2))
    before = copy.deepcopy(unet)
    merge_lora(unet, {}, write_lora(tmp_path, to_peft_layout(first)), 0.5)
    merge_lora(unet, {}, write_lora(tmp_path, to_peft_layout(second)), -2.0)
    for path in first:
        change = unet.get_submodule(path).weight - before.get_submodule(path).weight
        expected = 0.5 * first[path][1] @ first[path][0] - 2.0 * second[path][1] @ second[path][0]
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-6)


def test_sums_are_rounded_once_and_keep_the_weights_place(unet, tmp_path):
    """Half precision, as on the GPU, with convolutions in channels-last."""
    factors = build_factors(find_layers(unet, "conv1", "conv_shortcut", "attn1"))
    exact = copy.deepcopy(unet.half())
    before = exact.up_blocks[0].resnets[0].conv_shortcut.weight.clone()
    unet.to(memory_format=torch.channels_last)
    places = {path: (layer.weight.data_ptr(), layer.weight.stride()) for path, layer in find_layers(unet).items()}
    file = write_lora(tmp_path, {name: tensor.half() for name, tensor in to_peft_layout(factors).items()})
    merge_lora(unet, {}, file, 1.0)
    merge_lora(exact.float().to(memory_format=torch.channels_last), {}, file, 1.0)
    assert not torch.equal(exact.up_blocks[0].resnets[0].conv_shortcut.weight.half(), before)
    for path, layer in find_layers(unet).items():
        assert torch.equal(layer.weight, exact.get_submodule(path).weight.half())
        assert places[path] == (layer.weight.data_ptr(), layer.weight.stride())
        assert layer.weight.dtype == torch.float16 and not layer.weight.requires_grad


def test_a_convolution_of_one_pixel_fits_a_linear_layer_and_back(unet, tmp_path):
    """proj_in is a convolution in SD 1.5 and linear in SD 2.1; kohya-ss trains it as a convolution in both."""
    torch.manual_seed(0)
    for model in (unet, build_small_sd_unet()):
        factors = build_factors(find_layers(model, "proj_in"))
        turned = {path: tuple(toggle_kernel_dims(tensor) for tensor in pair) for path, pair in factors.items()}
        other = copy.deepcopy(model)
        merge_lora(model, {}, write_lora(tmp_path, to_peft_layout(factors)), 1.0)
        merge_lora(other, {}, write_lora(tmp_path, to_peft_layout(turned)), 1.0)
        for path, layer in find_layers(model).items():
            assert torch.equal(layer.weight, other.get_submodule(path).weight)


def toggle_kernel_dims(tensor):
    return tensor.flatten(1) if tensor.dim() == 4 else tensor[..., None, None]


LAYER = "unet.mid_block.attentions.0.proj_in"
DOWN, UP = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
GOOD = {DOWN: torch.ones(2, 16), UP: torch.ones(16, 2)}
REST = [f"unet.mid_block.resnets.0.conv1.lora_{side}.weight" for side in "AB"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({DOWN: torch.ones(2, 640)}, rf"{LAYER} is \(16, 640\) .*\(16, 16\)"),
        ({UP: torch.ones(8, 2)}, rf"{LAYER} is \(8, 16\) .*\(16, 16\)"),
        ({DOWN: torch.ones(2, 16, 3, 3), UP: torch.ones(16, 2, 1, 1)}, r"is \(16, 16, 3, 3\)"),
        ({REST[0]: torch.ones(2, 16, 1, 1), REST[1]: torch.ones(16, 2, 1, 1)}, r"conv1 is \(16, 16, 1, 1\)"),
        ({f"transformer.x.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, r"x is \(2, 2\) .*missing"),
        ({f"unet.conv_norm_out.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}, "missing"),
        ({UP: torch.ones(16, 3)}, rf"broken: .*{LAYER} .*\(16, 3\) and \(2, 16\)"),
        ({UP: torch.ones(16)}, "broken: the factors"),
        ({UP: torch.ones(16, 2, 3, 3)}, "broken: the factors"),
        ({DOWN: torch.ones(0, 16), UP: torch.ones(16, 0)}, "broken: the factors"),
        ({DOWN: None}, f"{LAYER} lacks"),
        ({"unet.x.alpha": torch.tensor(1.0)}, "x lacks"),
        ({f"{LAYER}.alpha": torch.ones(2)}, f"alpha of {LAYER}"),
        ({f"{LAYER}.alpha": torch.tensor(math.nan)}, f"{LAYER}.alpha .*NaN"),
        ({DOWN: torch.full((2, 16), math.nan)}, f"{DOWN} .*NaN"),
        ({UP: torch.full((16, 2), -math.inf).half()}, f"{UP} .*Inf"),
        ({UP: torch.ones(16, 2).int()}, f"{UP} is not floating-point"),
        ({f"{LAYER}.dora_scale": torch.ones(16)}, "unsupported kind: .*dora_scale"),
        ({f"{LAYER}.lora_magnitude_vector": torch.ones(16)}, "unsupported kind"),
        ({f"{LAYER}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "unsupported kind: .*lora_mid"),
        ({f"{LAYER}.lora_B.bias": torch.ones(16)}, "unsupported kind"),
        ({DOWN: None, UP: None, f"{LAYER}.hada_w1_a": torch.ones(16)}, "unsupported kind: .*hada_w1_a"),
        ({DOWN: None, UP: None, f"{LAYER}.lokr_w1": torch.ones(16)}, "unsupported kind: .*lokr_w1"),
        ({DOWN: None, UP: None, "unet.conv_in.weight": torch.ones(1)}, "not a LoRA: .*unet.conv_in.weight"),
        ({DOWN: None, UP: None}, "not a LoRA"),
    ],
)
def test_invalid_loras_are_rejected_and_change_nothing(unet, tmp_path, change, named):
    tensors = {name: tensor for name, tensor in (GOOD | change).items() if tensor is not None}
    before = copy.deepcopy(unet.state_dict())
    file = write_lora(tmp_path, tensors)
    with pytest.raises(DataError, match=named) as caught:
        merge_lora(unet, {}, file, 1.0)
    assert str(file) in caught.value.message and caught.value.hint
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ("{", "header"),
        ("[]", "header"),
        ('{"unet.lora_alpha": "x"}', "header"),
        ('{"unet.lora_alpha": NaN}', "header"),
        ('{"unet.alpha_pattern": {"(": 1}}', "header"),
        ('{"unet.use_dora": true}', "unsupported kind"),
    ],
)
def test_an_invalid_header_is_an_error(unet, tmp_path, header, named):
    with pytest.raises(DataError, match=named):
        merge_lora(unet, {}, write_lora(tmp_path, GOOD, lora_adapter_metadata=header), 1.0)


def test_a_whole_checkpoint_and_a_cut_file_are_no_loras(unet, xl_model, tmp_path):
    with pytest.raises(DataError, match="not a LoRA"):
        merge_lora(unet, {}, xl_model / "unet" / "diffusion_pytorch_model.safetensors", 1.0)
    file = write_lora(tmp_path, GOOD)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=str(file)):
        merge_lora(unet, {}, file, 1.0)
