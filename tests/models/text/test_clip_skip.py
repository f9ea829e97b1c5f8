"""--clip-skip selects the output layer of the text encoders, counted from the end."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from linfusion_cli.core.errors import UsageError
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.text.encode import TextEncoderChanges, encode_prompts, resolve_clip_layer

CPU = torch.device("cpu")
PROMPTS = "a hill", "a cat"


def encode(folder, clip_skip):
    changes = TextEncoderChanges(clip_skip=clip_skip)
    return encode_prompts(Model(folder), read_facts(Model(folder)), *PROMPTS, torch.float32, CPU, changes)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_sd_uses_an_earlier_layer_with_final_norm_as_in_diffusers(sd_model, clip_skip):
    encoder = (pipeline := StableDiffusionPipeline.from_pretrained(sd_model, safety_checker=None)).text_encoder
    if not hasattr(encoder, "text_model"):  # diffusers needs an attribute that newer versions of transformers lack
        encoder.__dict__["text_model"] = encoder
    result, default = encode(sd_model, clip_skip), encode(sd_model, None)
    for prompt, half, default_half in zip(
        PROMPTS, (result.positive, result.negative), (default.positive, default.negative), strict=True
    ):
        # diffusers ignores clip_skip for the negative prompt; A1111 and this project apply it to both.
        expected, _ = pipeline.encode_prompt(prompt, CPU, 1, False, clip_skip=clip_skip - 1)
        torch.testing.assert_close(half.hidden, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(half.hidden, default_half.hidden) == (clip_skip == 1)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_sdxl_uses_another_layer_of_both_encoders_as_in_diffusers(xl_model, clip_skip):
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_model)
    result, default = encode(xl_model, clip_skip), encode(xl_model, None)
    for prompt, half, default_half in zip(
        PROMPTS, (result.positive, result.negative), (default.positive, default.negative), strict=True
    ):
        expected, _, pooled, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, clip_skip=clip_skip - 2
        )
        torch.testing.assert_close(half.hidden, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(half.pooled, pooled, rtol=1e-5, atol=1e-5)
        assert torch.equal(half.hidden, default_half.hidden) == (clip_skip == 2)


def test_a_layer_beyond_the_first_is_an_error(xl_model):
    with pytest.raises(UsageError, match="--clip-skip 3 .*text_encoder has 2") as caught:
        encode(xl_model, 3)
    assert caught.value.setting == "clip_skip"


def test_the_default_layer_of_a_small_encoder_can_be_its_embedding():
    assert resolve_clip_layer(None, True, "text_encoder", 1) == 2
