"""Embeddings with textual inversions are those of diffusers; invalid files and tokens are rejected."""

import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from linfusion_cli.core.errors import DataError, UsageError
from linfusion_cli.models.adapters.textual_inversion import read_inversion, read_inversions
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.text.encode import TextEncoderChanges, encode_prompts
from tests.support.small_models import TEXT_WIDTH

CPU = torch.device("cpu")
ENCODER_PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


@pytest.fixture(scope="module")
def vectors():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, TEXT_WIDTH, generator=generator) for _ in range(2)]


@pytest.fixture
def sd(sd_model):
    return StableDiffusionPipeline.from_pretrained(sd_model, safety_checker=None)


@pytest.fixture
def xl(xl_model):
    return StableDiffusionXLPipeline.from_pretrained(xl_model)


def write_inversion(folder, tensors, name="style.safetensors"):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
    return folder / name


def encode(folder, prompt, *inversions, negative=""):
    """Encode the prompts with textual inversions (file, token)."""
    changes = TextEncoderChanges(inversions=read_inversions(inversions))
    facts = read_facts(Model(folder))
    return encode_prompts(Model(folder), facts, prompt, negative, torch.float32, CPU, changes)


def encode_with_diffusers(pipeline, prompt, negative):
    """Return hidden, negative hidden, and for SDXL pooled, negative pooled."""
    arguments = () if isinstance(pipeline, StableDiffusionXLPipeline) else (CPU, 1, True)
    with torch.no_grad():
        return pipeline.encode_prompt(prompt, *arguments, negative_prompt=negative)


def assert_same(result, expected):
    ours = [result.positive.hidden, result.negative.hidden, result.positive.pooled, result.negative.pooled]
    for mine, theirs in zip(ours, expected, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", ["<cat>", "emb_params"])
def test_sd_embeds_a_token_as_diffusers_does(sd, sd_model, tmp_path, vectors, count, layout):
    file = write_inversion(tmp_path, {layout: vectors[0][:count]}, "<cat>.safetensors")
    prompt, negative = "a <cat> on a hill", "no <cat>, blurry"
    plain = encode(sd_model, prompt, negative=negative)
    sd.load_textual_inversion({"<cat>": vectors[0][:count]})
    result = encode(sd_model, prompt, (file, None), negative=negative)
    assert_same(result, encode_with_diffusers(sd, prompt, negative))
    assert (result.positive.hidden - plain.positive.hidden).abs().max() > 0.01
    assert result.unused_tokens == ()


@pytest.mark.parametrize("count", [1, 3])
def test_sdxl_embeds_a_token_in_both_encoders(xl, xl_model, tmp_path, vectors, count):
    tensors = {key: rows[:count] for key, rows in zip(ENCODER_PARTS, vectors, strict=True)}
    for key, part in ENCODER_PARTS.items():
        tokenizer = getattr(xl, part.replace("text_encoder", "tokenizer"))
        xl.load_textual_inversion({"style": tensors[key]}, tokenizer=tokenizer, text_encoder=getattr(xl, part))
    prompt, negative = "a hill in style!", "style"
    plain = encode(xl_model, prompt, negative=negative)
    result = encode(xl_model, prompt, (write_inversion(tmp_path, tensors), None), negative=negative)
    assert_same(result, encode_with_diffusers(xl, prompt, negative))
    for half, before in ((result.positive, plain.positive), (result.negative, plain.negative)):
        assert (half.hidden - before.hidden).abs().amax(dim=(0, 1)).min() > 0 and (half.pooled != before.pooled).any()


def test_several_tokens_are_distinguished(sd, sd_model, tmp_path, vectors):
    first = write_inversion(tmp_path, {"emb_params": vectors[0]}, "0.safetensors")
    second = write_inversion(tmp_path, {"emb_params": vectors[1][:1]}, "1.safetensors")
    sd.load_textual_inversion([{"one": vectors[0]}, {"two": vectors[1][:1]}], token=["one", "two"])
    result = encode(sd_model, "one by two by one", (first, "one"), (second, "two"), negative="two")
    assert_same(result, encode_with_diffusers(sd, "one by two by one", "two"))


def test_tokens_are_case_insensitive(sd_model, tmp_path, vectors):
    """Like all tokens of CLIP."""
    file = write_inversion(tmp_path, {"emb_params": vectors[0]})
    result = [encode(sd_model, f"a {word} hill", (file, "MyStyle")) for word in ("MyStyle", "mystyle", "MYSTYLE")]
    assert all(
        torch.equal(each.positive.hidden, result[0].positive.hidden) and not each.unused_tokens for each in result
    )


def test_the_pooled_embedding_is_at_the_end_token_with_old_configs(xl_model, tmp_path, vectors, monkeypatch):
    """For the eos_token_id 2 of SDXL's config transformers uses the largest id, which is that of the added token."""
    from transformers import CLIPTextModelWithProjection

    file = write_inversion(tmp_path, dict(zip(ENCODER_PARTS, vectors, strict=True)))
    right = encode(xl_model, "a style", (file, None)).positive.pooled
    load = CLIPTextModelWithProjection.from_pretrained

    def load_with_old_config(*args, **options):
        module, info = load(*args, **options)
        for part in module.modules():
            if hasattr(part, "eos_token_id"):
                part.eos_token_id = 2
        return module, info

    monkeypatch.setattr(CLIPTextModelWithProjection, "from_pretrained", load_with_old_config)
    assert torch.equal(encode(xl_model, "a style", (file, None)).positive.pooled, right)


def test_a_token_in_neither_prompt_is_reported(sd_model, tmp_path, vectors):
    file = write_inversion(tmp_path, {"emb_params": vectors[0]})
    assert encode(sd_model, "a hill", (file, "xyz")).unused_tokens == ("xyz",)
    assert encode(sd_model, "a hill", (file, "xyz"), negative="xyz").unused_tokens == ()


def test_a_token_uses_as_many_positions_as_it_has_vectors(xl_model, tmp_path, vectors):
    tensors = {
        "clip_l": vectors[0][:2],
        "clip_g": vectors[1],
    }  # the second encoder has more vectors, so its limit counts
    file = write_inversion(tmp_path, tensors)
    result = encode(xl_model, "style" + "y" * 72, (file, None), negative="z" * 73 + "style end")
    assert result.truncated == {"negative prompt": "style end"}
    assert encode(xl_model, "style" + "y" * 73, (file, None)).truncated == {"prompt": "y"}


@pytest.mark.parametrize(
    ("key", "name", "given", "token"),
    [
        ("<cat-toy>", "learned_embeds", None, "<cat-toy>"),
        ("<cat-toy>", "learned_embeds", "toy", "toy"),
        ("emb_params", "badhands v4", None, "badhands v4"),
        ("clip_l", "xl", None, "xl"),
        ("text_encoders_0", "xl", "xl9", "xl9"),
    ],
)
def test_the_token_is_given_or_the_tensor_name_or_the_file_name(tmp_path, vectors, key, name, given, token):
    assert read_inversion(write_inversion(tmp_path, {key: vectors[0]}, f"{name}.safetensors"), given).token == token


def test_a_single_vector_may_have_one_dimension(tmp_path, vectors):
    assert read_inversion(write_inversion(tmp_path, {"x": vectors[0][0]})).vectors["text_encoder"].shape == (
        1,
        TEXT_WIDTH,
    )


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"emb_params": torch.ones(2, 24)}, "24 for text_encoder.*16 for"),
        (
            {"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 16)},
            "16 for text_encoder and 16 for text_encoder_2",
        ),
        ({"clip_g": torch.ones(2, 16)}, "16 for text_encoder_2,"),
        ({"a": torch.ones(2, 16), "b": torch.ones(2, 16)}, "not a textual inversion.* a, b"),
        ({"clip_l": torch.ones(2, 16), "b": torch.ones(2, 16)}, "not a textual inversion"),
        ({"clip_g": torch.ones(2, 16), "b": torch.ones(2, 16)}, "not a textual inversion"),
        ({"clip_l": torch.ones(2, 16), "text_encoders_0": torch.ones(2, 16)}, "not a textual inversion"),
        ({"x": torch.ones(2, 2, 16)}, r"x has the shape \(2, 2, 16\)"),
        ({"x": torch.ones(0, 16)}, r"x has the shape \(0, 16\)"),
        ({"x": torch.full((1, 16), torch.nan)}, "x .*NaN"),
        ({"x": torch.ones(1, 16).int()}, "x is not floating-point"),
        ({}, "not a textual inversion"),
    ],
)
def test_invalid_inversions_are_rejected(sd_model, tmp_path, tensors, named):
    file = write_inversion(tmp_path, tensors)
    with pytest.raises(DataError, match=named) as caught:
        encode(sd_model, "a style", (file, "style"))
    assert str(file) in caught.value.message and caught.value.hint


def test_an_inversion_for_sd_does_not_fit_sdxl(xl_model, tmp_path, vectors):
    with pytest.raises(DataError, match="16 for text_encoder, .* 16 for text_encoder and 16 for text_encoder_2"):
        encode(xl_model, "a style", (write_inversion(tmp_path, {"emb_params": vectors[0]}), None))


@pytest.mark.parametrize("token", ["a", "A", "<|endoftext|>"])
def test_a_token_in_the_vocabulary_is_rejected(sd_model, tmp_path, vectors, token):
    with pytest.raises(UsageError, match=re.escape(repr(token))) as caught:
        encode(sd_model, "a style", (write_inversion(tmp_path, {"emb_params": vectors[0]}), token))
    assert "FILE:TOKEN" in caught.value.hint and caught.value.setting == "textual_inversion"


def test_two_inversions_with_one_token_are_rejected(tmp_path, vectors):
    file, other = (
        write_inversion(tmp_path, {"emb_params": vectors[0]}, f"{name}.safetensors") for name in ("one", "two")
    )
    with pytest.raises(UsageError, match=r"one.safetensors and .*two.safetensors .*'ONE'"):
        read_inversions([(file, None), (other, "ONE")])
