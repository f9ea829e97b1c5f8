"""Networks are loaded exactly, embeddings are those of diffusers, and broken models are rejected."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.core.geometry import Size
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.layout import Model, Part
from linfusion_cli.models.load.networks import load_unet, load_vae
from linfusion_cli.models.text.encode import TimeIds, encode_prompts
from linfusion_cli.models.text.tokens import load_tokenizer, tokenize
from tests.support.small_models import build_small_text_config, write_small_xl

CPU = torch.device("cpu")
TIME_IDS = TimeIds(Size(640, 480), (8, 16), Size(320, 240))
PROMPT, NEGATIVE = "a [cat] with 😀 and ünïcode", "blurry"


def encode(folder: Path, prompt: str = PROMPT, negative: str = NEGATIVE):
    return encode_prompts(Model(folder), read_facts(Model(folder)), prompt, negative, torch.float32, CPU)


def test_sdxl_embeddings_are_those_of_diffusers(xl_model):
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_model)
    for negative in (NEGATIVE, ""):
        output = encode(xl_model, negative=negative)
        hidden, no_hidden, pooled, no_pooled = pipeline.encode_prompt(PROMPT, negative_prompt=negative or None)
        torch.testing.assert_close(output.positive.hidden, hidden)
        torch.testing.assert_close(output.positive.pooled, pooled)
        torch.testing.assert_close(output.negative.hidden, no_hidden)
        torch.testing.assert_close(output.negative.pooled, no_pooled)


def test_sd_embeddings_are_those_of_diffusers(sd_model):
    pipeline = StableDiffusionPipeline.from_pretrained(sd_model, safety_checker=None)
    hidden, no_hidden = pipeline.encode_prompt(PROMPT, CPU, 1, True, negative_prompt=NEGATIVE)
    output = encode(sd_model)
    torch.testing.assert_close(output.positive.hidden, hidden)
    torch.testing.assert_close(output.negative.hidden, no_hidden)
    assert output.positive.pooled is None and output.positive.build_added_conditions(TIME_IDS) is None


def test_size_conditioning_has_heights_first(xl_model):
    added = encode(xl_model).positive.build_added_conditions(TIME_IDS)
    assert added["time_ids"].tolist() == [[480, 640, 8, 16, 240, 320]]


def test_the_end_of_a_long_prompt_is_reported(xl_model):
    tokenizer = load_tokenizer(xl_model / "tokenizer", build_small_text_config())
    assert tokenize(tokenizer, "x" * 75, {}).truncated == ""
    assert tokenize(tokenizer, "x" * 75 + " Tail", {}).truncated == "Tail"
    assert encode(xl_model).truncated == {}
    long = encode(xl_model, prompt="y" * 75 + " Ünd 😀", negative="z" * 80)
    assert long.truncated == {"prompt": "Ünd 😀", "negative prompt": "z" * 5}


def test_a_tokenizer_with_another_padding_token_gives_the_embeddings_of_diffusers(copy):
    """Like the second tokenizer of SDXL, which pads with "!"."""
    config = copy / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "!"}))
    pipeline = StableDiffusionXLPipeline.from_pretrained(copy)
    assert pipeline.tokenizer_2.pad_token_id == 0
    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPT)
    output = encode(copy)
    torch.testing.assert_close(output.positive.hidden, hidden)
    torch.testing.assert_close(output.positive.pooled, pooled)


def test_parts_are_read_as_they_were_written(xl_model):
    from safetensors.torch import load_file

    unet = load_unet(Model(xl_model), torch.float32)
    for name, tensor in load_file(xl_model / "unet" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(unet.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in unet.parameters()) and not unet.training


def test_a_half_precision_variant_is_read(tmp_path):
    folder = write_small_xl(tmp_path / "half", variant="fp16")
    assert load_unet(Model(folder), torch.float32).dtype == torch.float32
    assert load_vae(Part(folder / "vae"), torch.float32, CPU).dtype == torch.float32


def test_a_half_precision_variant_is_read_beside_an_index_of_shards_that_are_not_here(tmp_path):
    """The state after a download: all configs and indices, but only fp16 weights."""
    folder = write_small_xl(tmp_path / "half", variant="fp16")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert load_unet(Model(folder), torch.float32).dtype == torch.float32
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(DataError, match="00001-of-00002.safetensors is missing"):
        load_unet(Model(folder), torch.float32)


def test_parameters_are_not_memory_mapped(xl_model):
    """Overwriting the file under a model that maps it would change its weights."""
    folder = shutil.copytree(xl_model / "unet", xl_model.parent / "mapped" / "unet").parent
    unet = load_unet(Model(folder), torch.float32)
    before = unet.conv_in.weight.clone()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-4096, 2)
        stream.write(bytes(4096))
    assert torch.equal(unet.conv_in.weight, before)
    shutil.rmtree(folder)


@pytest.fixture
def copy(xl_model, tmp_path):
    return shutil.copytree(xl_model, tmp_path / "copy")


def test_a_truncated_file_is_named(copy):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"unet/diffusion_pytorch_model\.safetensors"):
        load_unet(Model(copy), torch.float32)


def test_missing_weights_are_named(copy):
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(Unavailable, match="vae has no weights"):
        load_vae(Part(copy / "vae"), torch.float32, CPU)


@pytest.mark.parametrize("lost", [["*"], ["vocab.json", "tokenizer.json"]])
def test_a_tokenizer_without_vocabulary_is_rejected(copy, lost):
    for pattern in lost:
        for file in (copy / "tokenizer").glob(pattern):
            file.unlink()
    with pytest.raises(DataError, match="tokenizer.*no vocabulary"):
        encode(copy)


def test_a_tokenizer_that_cannot_be_read_is_refused(copy):
    (copy / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer could not be read"):
        encode(copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    config = build_small_text_config()
    config.vocab_size = 100
    with pytest.raises(DataError, match="514 .* 100"):
        load_tokenizer(copy / "tokenizer", config)


def test_the_token_limit_is_that_of_the_encoder(copy, xl_model):
    (copy / "tokenizer" / "tokenizer_config.json").unlink()
    torch.testing.assert_close(encode(copy).positive.hidden, encode(xl_model).positive.hidden)


@pytest.mark.parametrize(
    "part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder_2/model"]
)
def test_weights_that_do_not_fit_their_config_are_refused(copy, part):
    """The libraries initialize missing weights randomly and only log a warning."""
    from safetensors.torch import load_file, save_file

    file = copy / f"{part}.safetensors"
    tensors = load_file(file)
    name, tensor = tensors.popitem()
    facts = read_facts(Model(copy))

    def read_all():
        load_unet(Model(copy), torch.float32)
        load_vae(Part(copy / "vae"), torch.float32, CPU)
        encode_prompts(Model(copy), facts, PROMPT, "", torch.float32, CPU)

    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"lack {name}"):
        read_all()
    save_file(tensors | {name: tensor.new_zeros(3, 5)}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="do not fit"):
        read_all()
    save_file(tensors | {name: tensor, "more": tensor.clone()}, file, metadata={"format": "pt"})
    read_all()
