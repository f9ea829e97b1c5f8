"""The three families with real shapes on the meta device: keys of single files, and the layout of LinFusion weights."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from linfusion_cli.core.errors import DataError
from linfusion_cli.mixers.linear import weights
from linfusion_cli.mixers.linear.weights import CONFIG_NAME, ModuleSpec, build_meta_module, build_spec, check_specs
from linfusion_cli.models.families.facts import detect_family, detect_file_family
from linfusion_cli.models.files.header import Header
from linfusion_cli.models.load.networks import read_matching_state
from linfusion_cli.models.load.single_file import read_transformer_depths
from linfusion_cli.planning.meta_model import MetaModel, count_parameters
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.unet.estimate import ForwardSettings, estimate_unet
from tests.mixers.test_weights import build_meta_sdxl_unet
from tests.support.small_single_files import to_original_clip, to_original_open_clip, to_original_unet, to_original_vae
from tools.bench.shapes import build_linear_attentions

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
OPEN_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
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


def build_sd_unet(**fields):
    """Build the UNet of SD 1.5, or with `fields` that of SD 2.1."""
    with init_empty_weights():
        return UNet2DConditionModel(sample_size=64, **{"cross_attention_dim": 768} | fields)


UNETS = {
    "sdxl": build_meta_sdxl_unet,
    "sd21": lambda: build_sd_unet(
        cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
    "sd15": build_sd_unet,
}


def build_encoder(kind, **fields):
    with init_empty_weights():
        return kind(CLIPTextConfig(vocab_size=49408, **fields))


def build_vae():
    with init_empty_weights():
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )


def build_encoders(family):
    """Return the text encoders with the functions and prefixes that give the original tensor names."""
    clip, open_clip = "cond_stage_model.transformer.", "cond_stage_model.model."
    if family == "sd15":
        return [(build_encoder(CLIPTextModel, **CLIP_L), to_original_clip, clip)]
    if family == "sd21":
        return [(build_encoder(CLIPTextModel, **OPEN_CLIP_H), to_original_open_clip, open_clip)]
    second = build_encoder(CLIPTextModelWithProjection, projection_dim=1280, **OPEN_CLIP_G)
    return [
        (build_encoder(CLIPTextModel, **CLIP_L), to_original_clip, "conditioner.embedders.0.transformer."),
        (second, to_original_open_clip, "conditioner.embedders.1.model."),
    ]


def get_meta_parameters(module):
    return {name: parameter.to("meta") for name, parameter in module.named_parameters()}


@pytest.fixture(scope="module", params=UNETS)
def real(request):
    """Family, networks, and the header of the single file."""
    unet, vae, encoders = UNETS[request.param](), build_vae(), build_encoders(request.param)
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


def build_published_config(family):
    """Return the text of the published `config.json`."""
    entries = [asdict(spec) for spec in list_published_specs(family)]
    return json.dumps({"_class_name": "LinFusion", "_diffusers_version": "0.27.0", "modules_list": entries})


@pytest.fixture
def sdxl(tmp_path):
    """SDXL on the meta device, with linear attention from the published config."""
    (tmp_path / CONFIG_NAME).write_text(build_published_config("sdxl"))
    unet = build_meta_sdxl_unet()
    return MetaModel(unet, weights.build_meta_modules(tmp_path, unet), build_vae())


def test_sdxl_s_unet_with_linear_attention_takes_4_83_gib_in_fp16(sdxl):
    assert sdxl.total_unet_parameters - sdxl.count_unet_parameters("original") == NUMBERS["sdxl"]
    assert sdxl.count_unet_parameters("linear") == 2_593_261_284
    assert sdxl.count_unet_parameters("linear") * 2 / 2**30 == pytest.approx(4.83, abs=0.005)


def test_a_forward_of_sdxl_at_16k_is_1547_tflop(sdxl):
    with sdxl.with_attention("linear"):
        result = estimate_unet(sdxl.unet, ForwardSettings(StripSize(16, 8192), "device", 1, 2048, 2048, 2))
    assert result.flops == pytest.approx(1547e12, rel=0.005)


def test_benchmarks_run_linear_attention_as_published():
    unet = build_meta_sdxl_unet()
    with torch.device("meta"):
        modules = build_linear_attentions(unet)
    assert [build_spec(path, module) for path, module in modules.items()] == list_published_specs("sdxl")


@pytest.mark.parametrize("other", UNETS)
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
