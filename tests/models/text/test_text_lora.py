"""Embeddings with a merged LoRA are those of diffusers, for all file layouts."""

import json
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import nn

from linfusion_cli.core.errors import DataError
from linfusion_cli.models.adapters.lora import build_text_layer_paths, merge_lora, merge_text_lora
from linfusion_cli.models.adapters.lora_file import read_lora
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.text.encode import TextEncoderChanges, encode_prompts
from tests.support.small_models import build_small_sd_unet

CPU = torch.device("cpu")
PROMPT, NEGATIVE = "a cat", "blurry"
RANK = 3
KOHYA = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
LAYER = "encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module", params=["sd", "xl"])
def model(request, xl_model, sd_model):
    return Model(xl_model if request.param == "xl" else sd_model)


def load_pipeline(model):
    if read_facts(model).is_xl:
        return StableDiffusionXLPipeline.from_pretrained(model.folder)
    return StableDiffusionPipeline.from_pretrained(model.folder, safety_checker=None)


def get_encoders(pipeline):
    """Return part to text encoder."""
    parts = {part: getattr(pipeline, part, None) for part in KOHYA}
    return {part: encoder for part, encoder in parts.items() if encoder is not None}


def build_factors(pipeline, *kinds, seed=1):
    """Return random (down, up) by part and path (without `text_model`) for layers with one of `kinds` in the path."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for part, encoder in get_encoders(pipeline).items():
        for path, layer in encoder.named_modules():
            if isinstance(layer, nn.Linear) and any(kind in path for kind in kinds):
                down = torch.randn(RANK, layer.in_features, generator=generator) / math.sqrt(layer.in_features)
                up = torch.randn(layer.out_features, RANK, generator=generator) / math.sqrt(RANK)
                factors[part, path.removeprefix("text_model.")] = down, up
    return factors


def to_layout(factors, sides, level="text_model.", rename=lambda path: path):
    """Return tensors with the names of diffusers; `sides` are the suffixes of down and up before `.weight`."""
    return {
        f"{part}.{level}{rename(path)}{side}.weight": pair[i]
        for (part, path), pair in factors.items()
        for i, side in enumerate(sides)
    }


def to_peft_layout(factors, level="text_model."):
    return to_layout(factors, (".lora_A", ".lora_B"), level)


def to_diffusers_layout(factors):
    return to_layout(factors, (".lora_linear_layer.down", ".lora_linear_layer.up"))


def get_old_name(path):
    block, _, layer = path.rpartition(".")
    return f"{block}.{OLD[layer]}_lora" if layer in OLD else f"{path}.lora_linear_layer"


def to_old_layout(factors):
    return to_layout(factors, (".down", ".up"), rename=get_old_name)


def to_kohya_layout(factors, prefixes=KOHYA, alphas=(2.0,)):
    tensors = {}
    for i, ((part, path), (down, up)) in enumerate(factors.items()):
        name = prefixes[part] + f"text_model.{path}".replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors |= {f"{name}.alpha": torch.tensor(alphas[i % len(alphas)])}
    return tensors


def write_lora(folder, tensors, **header):
    file = folder / "lora.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt", **header})
    return file


def encode(model, *loras):
    """Encode the prompts with LoRAs (file, weight), and return a list of tensors."""
    facts = read_facts(model)
    result = encode_prompts(model, facts, PROMPT, NEGATIVE, torch.float32, CPU, TextEncoderChanges(loras))
    both = (result.positive, result.negative)
    return [both[i].hidden for i in (0, 1)] + [half.pooled for half in both if half.pooled is not None]


def encode_with_diffusers(pipeline, tensors, weight=1.0):
    """Encode the prompts with the LoRA loaded by diffusers."""
    if tensors:
        pipeline.load_lora_weights(dict(tensors), adapter_name="test")
        pipeline.set_adapters(["test"], [weight])
    is_xl = isinstance(pipeline, StableDiffusionXLPipeline)
    with torch.no_grad():
        return list(pipeline.encode_prompt(PROMPT, *(() if is_xl else (CPU, 1, True)), negative_prompt=NEGATIVE))


def assert_same(result, expected, before):
    """Check that `result` equals `expected` to 1e-5 and differs from `before`, the result without LoRA."""
    assert len(result) == len(expected)
    for ours, theirs, plain in zip(result, expected, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert (ours - plain).abs().max() > 0.01


@pytest.mark.parametrize("layout", [to_peft_layout, to_diffusers_layout, to_old_layout, to_kohya_layout])
def test_embeddings_are_those_of_diffusers(model, tmp_path, layout):
    pipeline = load_pipeline(model)
    kinds = ("self_attn",) if layout is to_old_layout else ("self_attn", "mlp")
    tensors = layout(build_factors(pipeline, *kinds))
    assert_same(
        encode(model, (write_lora(tmp_path, tensors), 0.7)),
        encode_with_diffusers(pipeline, tensors, 0.7),
        encode(model),
    )


def test_names_are_read_without_the_level_that_newer_libraries_left_out(model, tmp_path):
    factors = build_factors(load_pipeline(model), "q_proj", "fc2")
    with_level = encode(model, (write_lora(tmp_path, to_peft_layout(factors)), 1.0))
    without = encode(model, (write_lora(tmp_path, to_peft_layout(factors, level="")), 1.0))
    assert all(torch.equal(*pair) for pair in zip(with_level, without, strict=True))


def test_kohyas_name_for_a_single_encoder_is_read(sd_model, tmp_path):
    pipeline = load_pipeline(Model(sd_model))
    factors = build_factors(pipeline, "self_attn")
    tensors = to_kohya_layout(factors, {"text_encoder": "lora_te_"})
    expected = encode_with_diffusers(pipeline, tensors)
    assert_same(encode(Model(sd_model), (write_lora(tmp_path, tensors), 1.0)), expected, encode(Model(sd_model)))


def test_the_projection_of_sdxls_second_encoder_is_changed(xl_model, tmp_path):
    pipeline = load_pipeline(Model(xl_model))
    down, up = torch.randn(RANK, 16), torch.randn(16, RANK)
    names = {"lora_te2_text_projection.lora_down.weight": down, "lora_te2_text_projection.lora_up.weight": up}
    before = pipeline.text_encoder_2.text_projection.weight.clone()
    assert merge_text_lora(pipeline.text_encoder_2, "text_encoder_2", write_lora(tmp_path, names), 0.5) == 1
    torch.testing.assert_close(pipeline.text_encoder_2.text_projection.weight, before + 0.5 * up @ down)


def test_each_layers_alpha_counts(sd_model, tmp_path):
    encoder = load_pipeline(Model(sd_model)).text_encoder
    factors = build_factors(load_pipeline(Model(sd_model)), "q_proj", "k_proj", "fc1")
    alphas = (1.0, 2.0, 4.0, 0.5)
    before = {path: encoder.get_submodule(path).weight.clone() for _, path in factors}
    merge_text_lora(encoder, "text_encoder", write_lora(tmp_path, to_kohya_layout(factors, alphas=alphas)), 2.0)
    for i, ((_, path), (down, up)) in enumerate(factors.items()):
        change = encoder.get_submodule(path).weight - before[path]
        torch.testing.assert_close(change, 2.0 * alphas[i % 4] / RANK * up @ down, rtol=1e-4, atol=1e-6)


def test_alphas_in_the_header_count_for_their_part(xl_model, tmp_path):
    pipeline = load_pipeline(Model(xl_model))
    factors = build_factors(pipeline, "q_proj", "fc1")
    header = {"text_encoder.lora_alpha": 6, "text_encoder.alpha_pattern": {"fc1": 9}, "text_encoder_2.lora_alpha": 1}
    file = write_lora(tmp_path, to_peft_layout(factors), lora_adapter_metadata=json.dumps(header))
    scales = {(part, layer.split("_")[0]): 1.0 for part in KOHYA for layer in ("q_proj", "fc1")}
    scales |= {("text_encoder", "q"): 2.0, ("text_encoder", "fc1"): 3.0}
    scales |= {("text_encoder_2", "q"): 1 / 3, ("text_encoder_2", "fc1"): 1 / 3}
    for part in KOHYA:
        for name, read in read_lora(file, part).layers.items():
            assert read.scale == pytest.approx(scales[part, name.rpartition(".")[2].split("_")[0]])


def test_sums_are_rounded_once(sd_model, tmp_path):
    half = load_pipeline(Model(sd_model)).text_encoder.half()
    file = write_lora(tmp_path, to_peft_layout(build_factors(load_pipeline(Model(sd_model)), "self_attn", "mlp")))
    exact = load_pipeline(Model(sd_model)).text_encoder.half().float()
    assert merge_text_lora(half, "text_encoder", file, 0.3) == merge_text_lora(exact, "text_encoder", file, 0.3) == 12
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).half()) and parameter.dtype == torch.float16


def test_a_file_for_text_encoders_alone_leaves_the_unet_as_it_is(sd_model, tmp_path):
    unet = build_small_sd_unet()
    before = [parameter.clone() for parameter in unet.parameters()]
    file = write_lora(tmp_path, to_peft_layout(build_factors(load_pipeline(Model(sd_model)), "q_proj")))
    assert merge_lora(unet, {}, file, 1.0).layers == 0
    assert all(torch.equal(*pair) for pair in zip(unet.parameters(), before, strict=True))


def test_a_lora_for_an_encoder_that_the_model_lacks_is_refused(sd_model, xl_model, tmp_path):
    file = write_lora(tmp_path, to_peft_layout(build_factors(load_pipeline(Model(xl_model)), "q_proj")))
    with pytest.raises(DataError, match="text_encoder_2") as caught:
        encode(Model(sd_model), (file, 1.0))
    assert str(file) in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("name", "down", "named"),
    [
        (
            f"text_encoder.text_model.{LAYER}",
            (2, 640),
            rf"{LAYER} is \(32, 640\) .*\(32, 16\)",
        ),
        ("text_encoder.text_model.encoder.layers.9.mlp.fc1", (2, 16), "missing"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", (2, 8), r"mlp_fc1 is \(32, 8\) .* \(32, 16\)"),
    ],
)
def test_a_mismatch_is_named_with_both_shapes(sd_model, tmp_path, name, down, named):
    tensors = {f"{name}.lora_down.weight": torch.ones(down), f"{name}.lora_up.weight": torch.ones(32, 2)}
    with pytest.raises(DataError, match=named):
        encode(Model(sd_model), (write_lora(tmp_path, tensors), 1.0))


def test_other_kinds_are_refused_in_the_text_part_too(sd_model, tmp_path):
    tensors = to_kohya_layout(build_factors(load_pipeline(Model(sd_model)), "q_proj"))
    file = write_lora(tmp_path, tensors | {"lora_te1_text_model_x.dora_scale": torch.ones(2)})
    with pytest.raises(DataError, match="unsupported kind: .*lora_te1_text_model_x.dora_scale"):
        encode(Model(sd_model), (file, 1.0))


def test_no_two_layers_share_a_name(model):
    for encoder in get_encoders(load_pipeline(model)).values():
        layers = [path for path, layer in encoder.named_modules() if isinstance(layer, nn.Linear)]
        paths = build_text_layer_paths(encoder)
        assert set(paths.values()) == set(layers)
        # Each layer with and without `text_model`; attention layers have an old name in addition.
        old = [path for path in layers if path.rpartition(".")[2] in OLD]
        assert len(paths) == 2 * (len(layers) + len(old))
