"""The three families with real shapes on the meta device: keys of single files, and the layout of LinFusion weights."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from linfusion_cli.core.errors import DataError
from linfusion_cli.mixers.linear.weights import (
    CONFIG_NAME,
    ModuleSpec,
    build_meta_module,
    build_spec,
    check_specs,
    read_specs,
)
from linfusion_cli.models.families.facts import detect_family, detect_file_family, read_facts
from linfusion_cli.models.files.header import Header
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.load.networks import load_meta, read_matching_state
from linfusion_cli.models.load.single_file import read_transformer_depths
from linfusion_cli.models.locate.published import get_configs, get_linfusion_config
from linfusion_cli.planning.meta_model import MetaModel, count_parameters
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.unet.estimate import ForwardSettings, estimate_unet
from tests.support.small_single_files import to_original_clip, to_original_open_clip, to_original_unet, to_original_vae
from tools.bench.shapes import build_linear_attentions

FAMILIES = ("sdxl", "sd21", "sd15")
# Keys by which diffusers detects a family (loaders/single_file_utils.py), and other keys of the published files.
KNOWN_KEYS = {
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.norm3.bias": (1280,),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.up.0.upsample.conv.weight": None,
    },
    "sd21": {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    },
    "sd15": {
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "first_stage_model.decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3),
        "first_stage_model.quant_conv.bias": (8,),
    },
}


def build_unet(family):
    return load_meta(UNet2DConditionModel, Model(get_configs(family)).get_part("unet"))


def build_vae(family):
    return load_meta(AutoencoderKL, Model(get_configs(family)).get_part("vae"))


def build_encoders(family):
    """Return the text encoders with the functions and prefixes that give the original tensor names."""
    model, clip = Model(get_configs(family)), "cond_stage_model.transformer."
    first = load_meta(CLIPTextModel, model.get_part("text_encoder"))
    if family == "sd15":
        return [(first, to_original_clip, clip)]
    if family == "sd21":
        return [(first, to_original_open_clip, "cond_stage_model.model.")]
    second = load_meta(CLIPTextModelWithProjection, model.get_part("text_encoder_2"))
    return [
        (first, to_original_clip, "conditioner.embedders.0.transformer."),
        (second, to_original_open_clip, "conditioner.embedders.1.model."),
    ]


def get_meta_parameters(module):
    return {name: parameter.to("meta") for name, parameter in module.named_parameters()}


@pytest.fixture(scope="module", params=FAMILIES)
def real(request):
    """Family, networks, and the header of the single file."""
    unet, vae, encoders = build_unet(request.param), build_vae(request.param), build_encoders(request.param)
    tensors = to_original_unet(unet, get_meta_parameters(unet)) | to_original_vae(vae, get_meta_parameters(vae))
    for encoder, rename, prefix in encoders:
        tensors |= rename(get_meta_parameters(encoder), prefix)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    header = Header(Path("real.safetensors"), shapes, dict.fromkeys(shapes, "F16"), {})
    return request.param, [unet, vae, *(encoder for encoder, _, _ in encoders)], header


def test_the_family_is_detected_by_names_and_shapes(real):
    family, (unet, *_), header = real
    assert detect_family(dict(unet.config)) == detect_file_family(header) == family
    assert read_transformer_depths(header, unet.config) == {}


def test_the_keys_are_those_of_the_published_files(real):
    family, _, header = real
    for name, shape in KNOWN_KEYS[family].items():
        assert header.shapes.get(name) == shape, name


def test_every_tensor_of_every_network_is_found_in_the_single_file(real):
    _, networks, header = real
    for network in networks:
        result = read_matching_state(network, header, on_meta=True)
        assert result.keys() == dict(network.named_parameters()).keys()


def list_published_specs(family):
    """Return the entries of the published `modules_list` in its order: down, up, middle.

    `projection_mid_dim` is a sixteenth of the channels for SDXL, and null, which means all channels, for the others.
    """
    if family == "sdxl":
        places = [(f"down_blocks.1.attentions.{i}", 2, 640, 10) for i in (0, 1)]
        places += [(f"down_blocks.2.attentions.{i}", 10, 1280, 20) for i in (0, 1)]
        places += [(f"up_blocks.0.attentions.{i}", 10, 1280, 20) for i in (0, 1, 2)]
        places += [(f"up_blocks.1.attentions.{i}", 2, 640, 10) for i in (0, 1, 2)]
        places += [("mid_block.attentions.0", 10, 1280, 20)]
    else:
        heads = dict(zip((320, 640, 1280), (5, 10, 20) if family == "sd21" else (8, 8, 8), strict=True))
        places = [(f"down_blocks.{b}.attentions.{i}", 1, c, heads[c]) for b, c in enumerate(heads) for i in (0, 1)]
        up = list(enumerate(reversed(heads), 1))
        places += [(f"up_blocks.{b}.attentions.{i}", 1, c, heads[c]) for b, c in up for i in (0, 1, 2)]
        places += [("mid_block.attentions.0", 1, 1280, heads[1280])]
    return [
        ModuleSpec(f"{path}.transformer_blocks.{block}.attn1", width, heads, width // 16 if family == "sdxl" else None)
        for path, blocks, width, heads in places
        for block in range(blocks)
    ]


COUNTS = {"sdxl": 70, "sd21": 16, "sd15": 16}
NUMBERS = {"sdxl": 435_480_800, "sd21": 99_235_520, "sd15": 99_235_520}  # 871 and 198 MB in fp16, as on the hub


def test_linear_attention_fits_key_by_key(real):
    """Compare all keys, e.g. `{i}.to_q.weight`, with the published files."""
    family, (unet, *_), _ = real
    specs = list_published_specs(family)
    assert len(specs) == COUNTS[family]
    check_specs(Path("published"), specs, unet)
    modules = [build_meta_module(spec) for spec in specs]
    assert sum(map(count_parameters, modules)) == NUMBERS[family]
    assert [build_spec(spec.module_name, module) for spec, module in zip(specs, modules, strict=True)] == specs
    shapes = {name: tuple(tensor.shape) for name, tensor in nn.ModuleList(modules).state_dict().items()}
    expected = {}
    for i, spec in enumerate(specs):
        width, middle = spec.dim_n, spec.projection_mid_dim or spec.dim_n
        expected |= {f"{i}.{name}.weight": (width, width) for name in ("to_q", "to_k", "to_v", "to_out.0")}
        expected |= {f"{i}.to_out.0.bias": (width,)}
        for name in (f"{i}.to_q_", f"{i}.to_k_"):
            expected |= {f"{name}.0.weight": (middle, width), f"{name}.3.weight": (width, middle)}
            expected |= {f"{name}.1.weight": (middle,), f"{name}.3.bias": (width,)}
            expected |= {f"{name}.{j}.bias": (middle,) for j in (0, 1)}
    assert shapes == expected


PARAMETERS = {"sdxl": 2567.46, "sd21": 865.91, "sd15": 859.52}  # of the UNets, in millions
TEXT_PARAMETERS = {"sdxl": [123.06, 694.66], "sd21": [340.39], "sd15": [123.06]}


def test_the_networks_have_the_published_sizes(real):
    family, (unet, vae, *encoders), _ = real
    counts = [count_parameters(network) / 1e6 for network in (unet, vae, *encoders)]
    assert counts == pytest.approx([PARAMETERS[family], 83.65, *TEXT_PARAMETERS[family]], abs=0.006)


def test_the_configs_that_come_with_the_program_are_consistent(real):
    family, (unet, *_), _ = real
    assert read_specs(get_linfusion_config(family) / CONFIG_NAME) == list_published_specs(family)
    facts = read_facts(Model(get_configs(family)))
    native_px, prediction = {"sdxl": (1024, "epsilon"), "sd21": (768, "v_prediction"), "sd15": (512, None)}[family]
    assert (facts.family, facts.native_px, facts.vae_native_px) == (family, native_px, native_px)
    assert (facts.prediction_type, facts.warnings) == (prediction, ())
    for file in get_configs(family).rglob("*"):
        assert file.is_dir() or (file.suffix == ".json" and file.stat().st_size < 12_000)


@pytest.fixture
def sdxl():
    """SDXL on the meta device, with linear attention from the published config."""
    return MetaModel.read(Model(get_configs("sdxl")), get_linfusion_config("sdxl"))


def test_sdxl_s_unet_with_linear_attention_takes_4_83_gib_in_fp16(sdxl):
    assert sdxl.total_unet_parameters - sdxl.count_unet_parameters("original") == NUMBERS["sdxl"]
    assert sdxl.count_unet_parameters("linear") == 2_593_261_284
    assert sdxl.count_unet_parameters("linear") * 2 / 2**30 == pytest.approx(4.83, abs=0.005)


def test_a_forward_of_sdxl_at_16k_is_1547_tflop(sdxl):
    with sdxl.with_attention("linear"):
        result = estimate_unet(sdxl.unet, ForwardSettings(StripSize(16, 8192), "device", 1, 2048, 2048, 2))
    assert result.flops == pytest.approx(1547e12, rel=0.005)


def test_benchmarks_run_linear_attention_as_published():
    unet = build_unet("sdxl")
    with torch.device("meta"):
        modules = build_linear_attentions(unet)
    assert [build_spec(path, module) for path, module in modules.items()] == list_published_specs("sdxl")


@pytest.mark.parametrize("other", FAMILIES)
def test_another_familys_linear_attention_is_refused_by_its_first_layer(real, other):
    family, (unet, *_), _ = real
    if other == family:
        return
    theirs = {spec.module_name: (spec.dim_n, spec.heads) for spec in list_published_specs(other)}
    own = list_published_specs(family)
    first = next(spec for spec in own if theirs.get(spec.module_name) != (spec.dim_n, spec.heads))
    with pytest.raises(DataError) as caught:
        check_specs(Path("published"), list_published_specs(other), unet)
    assert f": {first.module_name} has " in caught.value.message
    assert f"{first.dim_n} channels in {first.heads} heads in the model" in caught.value.message
