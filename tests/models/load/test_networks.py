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
from tests.support.small_models import small_text_config, write_small_xl

CPU = torch.device("cpu")
TOLD = TimeIds(Size(640, 480), (8, 16), Size(320, 240))
PROMPT, NEGATIVE = "a [cat] with 😀 and ünïcode", "blurry"


def conditioning(folder: Path, prompt: str = PROMPT, negative: str = NEGATIVE):
    return encode_prompts(Model(folder), read_facts(Model(folder)), prompt, negative, torch.float32, CPU)


def test_sdxl_hears_what_diffusers_pipeline_hears(xl_model):
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_model)
    for negative in (NEGATIVE, ""):
        found = conditioning(xl_model, negative=negative)
        hidden, no_hidden, pooled, no_pooled = pipeline.encode_prompt(PROMPT, negative_prompt=negative or None)
        torch.testing.assert_close(found.positive.hidden, hidden)
        torch.testing.assert_close(found.positive.pooled, pooled)
        torch.testing.assert_close(found.negative.hidden, no_hidden)
        torch.testing.assert_close(found.negative.pooled, no_pooled)


def test_sd_hears_what_diffusers_pipeline_hears(sd_model):
    pipeline = StableDiffusionPipeline.from_pretrained(sd_model, safety_checker=None)
    hidden, no_hidden = pipeline.encode_prompt(PROMPT, CPU, 1, True, negative_prompt=NEGATIVE)
    found = conditioning(sd_model)
    torch.testing.assert_close(found.positive.hidden, hidden)
    torch.testing.assert_close(found.negative.hidden, no_hidden)
    assert found.positive.pooled is None and found.positive.build_added_conditions(TOLD) is None


def test_size_conditioning_has_heights_first(xl_model):
    added = conditioning(xl_model).positive.build_added_conditions(TOLD)
    assert added["time_ids"].tolist() == [[480, 640, 8, 16, 240, 320]]


def test_the_end_of_a_long_prompt_is_told(xl_model):
    tokenizer = load_tokenizer(xl_model / "tokenizer", small_text_config())
    assert tokenize(tokenizer, "x" * 75, {}).truncated == ""
    assert tokenize(tokenizer, "x" * 75 + " Tail", {}).truncated == "Tail"
    assert conditioning(xl_model).truncated == {}
    long = conditioning(xl_model, prompt="y" * 75 + " Ünd 😀", negative="z" * 80)
    assert long.truncated == {"prompt": "Ünd 😀", "negative prompt": "z" * 5}


def test_a_tokenizer_that_fills_up_with_another_token_is_heard_as_in_diffusers(copy):
    """As SDXL's second one does, with "!"."""
    config = copy / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "!"}))
    pipeline = StableDiffusionXLPipeline.from_pretrained(copy)
    assert pipeline.tokenizer_2.pad_token_id == 0
    hidden, _, pooled, _ = pipeline.encode_prompt(PROMPT)
    found = conditioning(copy)
    torch.testing.assert_close(found.positive.hidden, hidden)
    torch.testing.assert_close(found.positive.pooled, pooled)


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
    """As downloads leave it: all small files, and of the weights the smaller variant."""
    folder = write_small_xl(tmp_path / "half", variant="fp16")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert load_unet(Model(folder), torch.float32).dtype == torch.float32
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(DataError, match="00001-of-00002.safetensors is missing"):
        load_unet(Model(folder), torch.float32)


def test_parameters_do_not_lie_in_the_file(xl_model):
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
    with pytest.raises(DataError, match=r"unet/diffusion_pytorch_model\.safetensors is not a whole"):
        load_unet(Model(copy), torch.float32)


def test_missing_weights_are_named(copy):
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(Unavailable, match="vae has no weights"):
        load_vae(Part(copy / "vae"), torch.float32, CPU)


@pytest.mark.parametrize("lost", [["*"], ["vocab.json", "tokenizer.json"]])
def test_a_tokenizer_without_words_is_refused(copy, lost):
    for pattern in lost:
        for file in (copy / "tokenizer").glob(pattern):
            file.unlink()
    with pytest.raises(DataError, match="tokenizer has no vocabulary"):
        conditioning(copy)


def test_a_tokenizer_that_cannot_be_read_is_refused(copy):
    (copy / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer could not be read"):
        conditioning(copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    config = small_text_config()
    config.vocab_size = 100
    with pytest.raises(DataError, match="has 514 words, and its encoder knows 100"):
        load_tokenizer(copy / "tokenizer", config)


def test_the_window_is_the_encoders_whatever_the_tokenizer_says(copy, xl_model):
    (copy / "tokenizer" / "tokenizer_config.json").unlink()
    torch.testing.assert_close(conditioning(copy).positive.hidden, conditioning(xl_model).positive.hidden)


@pytest.mark.parametrize(
    "part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder_2/model"]
)
def test_weights_that_do_not_fit_their_config_are_refused(copy, part):
    """Libraries fill what is missing with random numbers, and say so in a log that nobody reads."""
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
