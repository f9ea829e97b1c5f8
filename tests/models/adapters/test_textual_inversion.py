"""Prompts with textual inversions are heard as diffusers hears them; what cannot be is named."""

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
LEVELS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


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


def write(folder, tensors, name="style.safetensors"):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
    return folder / name


def hear(folder, prompt, *inversions, negative=""):
    """What we make of the prompts with textual inversions (file, token)."""
    changes = TextEncoderChanges(inversions=read_inversions(inversions))
    facts = read_facts(Model(folder))
    return encode_prompts(Model(folder), facts, prompt, negative, torch.float32, CPU, changes)


def hear_with_diffusers(pipeline, prompt, negative):
    """hidden, negative hidden, and for SDXL pooled, negative pooled."""
    how = () if isinstance(pipeline, StableDiffusionXLPipeline) else (CPU, 1, True)
    with torch.no_grad():
        return pipeline.encode_prompt(prompt, *how, negative_prompt=negative)


def assert_same(found, wanted):
    ours = [found.positive.hidden, found.negative.hidden, found.positive.pooled, found.negative.pooled]
    for mine, theirs in zip(ours, wanted, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", ["<cat>", "emb_params"])
def test_sd_hears_a_word_as_diffusers_does(sd, sd_model, tmp_path, vectors, count, layout):
    file = write(tmp_path, {layout: vectors[0][:count]}, "<cat>.safetensors")
    prompt, negative = "a <cat> on a hill", "no <cat>, blurry"
    plain = hear(sd_model, prompt, negative=negative)
    sd.load_textual_inversion({"<cat>": vectors[0][:count]})
    found = hear(sd_model, prompt, (file, None), negative=negative)
    assert_same(found, hear_with_diffusers(sd, prompt, negative))
    assert (found.positive.hidden - plain.positive.hidden).abs().max() > 0.01
    assert found.unused_tokens == ()


@pytest.mark.parametrize("count", [1, 3])
def test_sdxl_hears_a_word_in_both_encoders(xl, xl_model, tmp_path, vectors, count):
    tensors = {key: rows[:count] for key, rows in zip(LEVELS, vectors, strict=True)}
    for key, part in LEVELS.items():
        tokenizer = getattr(xl, part.replace("text_encoder", "tokenizer"))
        xl.load_textual_inversion({"style": tensors[key]}, tokenizer=tokenizer, text_encoder=getattr(xl, part))
    prompt, negative = "a hill in style!", "style"
    plain = hear(xl_model, prompt, negative=negative)
    found = hear(xl_model, prompt, (write(tmp_path, tensors), None), negative=negative)
    assert_same(found, hear_with_diffusers(xl, prompt, negative))
    for half, before in ((found.positive, plain.positive), (found.negative, plain.negative)):
        assert (half.hidden - before.hidden).abs().amax(dim=(0, 1)).min() > 0 and (half.pooled != before.pooled).any()


def test_several_words_are_told_apart(sd, sd_model, tmp_path, vectors):
    first = write(tmp_path, {"emb_params": vectors[0]}, "0.safetensors")
    second = write(tmp_path, {"emb_params": vectors[1][:1]}, "1.safetensors")
    sd.load_textual_inversion([{"one": vectors[0]}, {"two": vectors[1][:1]}], token=["one", "two"])
    found = hear(sd_model, "one by two by one", (first, "one"), (second, "two"), negative="two")
    assert_same(found, hear_with_diffusers(sd, "one by two by one", "two"))


def test_a_word_is_known_in_capitals_too(sd_model, tmp_path, vectors):
    """As everywhere in CLIP's vocabulary."""
    file = write(tmp_path, {"emb_params": vectors[0]})
    found = [hear(sd_model, f"a {word} hill", (file, "MyStyle")) for word in ("MyStyle", "mystyle", "MYSTYLE")]
    assert all(torch.equal(each.positive.hidden, found[0].positive.hidden) and not each.unused_tokens for each in found)


def test_the_pooled_embedding_stands_at_the_end_whatever_old_configs_say(xl_model, tmp_path, vectors, monkeypatch):
    """SDXL's own config says eos_token_id 2, and transformers then looks for the largest id: that of the new word."""
    from transformers import CLIPTextModelWithProjection

    file = write(tmp_path, dict(zip(LEVELS, vectors, strict=True)))
    right = hear(xl_model, "a style", (file, None)).positive.pooled
    load = CLIPTextModelWithProjection.from_pretrained

    def load_old(*given, **options):
        module, found = load(*given, **options)
        for part in module.modules():
            if hasattr(part, "eos_token_id"):
                part.eos_token_id = 2
        return module, found

    monkeypatch.setattr(CLIPTextModelWithProjection, "from_pretrained", load_old)
    assert torch.equal(hear(xl_model, "a style", (file, None)).positive.pooled, right)


def test_a_word_that_neither_prompt_has_is_told(sd_model, tmp_path, vectors):
    file = write(tmp_path, {"emb_params": vectors[0]})
    assert hear(sd_model, "a hill", (file, "xyz")).unused_tokens == ("xyz",)
    assert hear(sd_model, "a hill", (file, "xyz"), negative="xyz").unused_tokens == ()


def test_a_word_takes_as_much_room_as_it_has_vectors(xl_model, tmp_path, vectors):
    tensors = {"clip_l": vectors[0][:2], "clip_g": vectors[1]}  # of the two encoders the second has less room
    file = write(tmp_path, tensors)
    found = hear(xl_model, "style" + "y" * 72, (file, None), negative="z" * 73 + "style end")
    assert found.truncated == {"negative prompt": "style end"}
    assert hear(xl_model, "style" + "y" * 73, (file, None)).truncated == {"prompt": "y"}


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
def test_the_token_is_the_one_given_or_the_files_own_or_its_name(tmp_path, vectors, key, name, given, token):
    assert read_inversion(write(tmp_path, {key: vectors[0]}, f"{name}.safetensors"), given).token == token


def test_a_single_vector_may_have_one_dimension(tmp_path, vectors):
    assert read_inversion(write(tmp_path, {"x": vectors[0][0]})).vectors["text_encoder"].shape == (1, TEXT_WIDTH)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"emb_params": torch.ones(2, 24)}, "widths are 24 for text_encoder, and the model takes 16 for"),
        (
            {"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 16)},
            "16 for text_encoder and 16 for text_encoder_2, and",
        ),
        ({"clip_g": torch.ones(2, 16)}, "16 for text_encoder_2, and"),
        ({"a": torch.ones(2, 16), "b": torch.ones(2, 16)}, "is no textual inversion: it holds a, b"),
        ({"clip_l": torch.ones(2, 16), "b": torch.ones(2, 16)}, "is no textual inversion"),
        ({"clip_g": torch.ones(2, 16), "b": torch.ones(2, 16)}, "is no textual inversion"),
        ({"clip_l": torch.ones(2, 16), "text_encoders_0": torch.ones(2, 16)}, "is no textual inversion"),
        ({"x": torch.ones(2, 2, 16)}, r"x has the shape \(2, 2, 16\)"),
        ({"x": torch.ones(0, 16)}, r"x has the shape \(0, 16\)"),
        ({"x": torch.full((1, 16), torch.nan)}, "x is not all finite"),
        ({"x": torch.ones(1, 16).int()}, "x is not all finite"),
        ({}, "is no textual inversion: it holds nothing"),
    ],
)
def test_what_fits_no_model_is_named(sd_model, tmp_path, tensors, named):
    file = write(tmp_path, tensors)
    with pytest.raises(DataError, match=named) as caught:
        hear(sd_model, "a style", (file, "style"))
    assert str(file) in caught.value.message and caught.value.hint


def test_an_inversion_for_sd_does_not_fit_sdxl(xl_model, tmp_path, vectors):
    with pytest.raises(DataError, match="16 for text_encoder, .* 16 for text_encoder and 16 for text_encoder_2"):
        hear(xl_model, "a style", (write(tmp_path, {"emb_params": vectors[0]}), None))


@pytest.mark.parametrize("token", ["a", "A", "<|endoftext|>"])
def test_a_word_of_the_models_own_is_refused(sd_model, tmp_path, vectors, token):
    with pytest.raises(UsageError, match="is a word of the model's own") as caught:
        hear(sd_model, "a style", (write(tmp_path, {"emb_params": vectors[0]}), token))
    assert "FILE:TOKEN" in caught.value.hint and caught.value.setting == "textual_inversion"


def test_two_of_one_name_are_refused(tmp_path, vectors):
    file, other = (write(tmp_path, {"emb_params": vectors[0]}, f"{name}.safetensors") for name in ("one", "two"))
    with pytest.raises(UsageError, match=r"Both .*one.safetensors and .*two.safetensors are called 'ONE'"):
        read_inversions([(file, None), (other, "ONE")])
