"""Prompts in a whole run: LoRAs for UNet and text encoders, textual inversions, clip skip, and notices."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from linfusion_cli.core.errors import DataError, UsageError
from linfusion_cli.core.events import Notice, StageFinished
from linfusion_cli.core.geometry import Size
from linfusion_cli.images import read_info
from linfusion_cli.run.pipeline import generate
from tests.support.fakes import Listener
from tests.support.requests import make_request
from tests.support.small_models import TEXT_WIDTH

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
ADAPTED = ("attn1.to_q", "attn2.to_k", "ff.net.2", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")


@pytest.fixture
def make(tmp_path):
    """Return a function that runs generate() at 64 px with softmax attention -> the events."""

    def run(model, prompt="a hill", **changed):
        listener = Listener()
        values = {"size": Size(64, 64), "linfusion": "none", "steps": (3,), "seed": 5, "guidance_scale": (3.0,)}
        request = make_request(
            prompt=prompt, model=str(model), output=tmp_path / "out.png", overwrite=True, **values | changed
        )
        generate(request, {}, listener)
        return listener

    return run


def get_notices(listener):
    return [notice.text for notice in listener.of(Notice)]


def write_tensors(folder, name, tensors):
    save_file(tensors, folder / name)
    return str(folder / name)


def lora_for(pipeline, kohya):
    """Return a LoRA for the UNet and all text encoders of `pipeline`, in the format of kohya-ss or diffusers."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for part in KOHYA:
        network = getattr(pipeline, part, None)
        for path, layer in network.named_modules() if network is not None else ():
            if isinstance(layer, nn.Linear) and path.endswith(ADAPTED):
                path = path.removeprefix("text_model.")
                down = torch.randn(3, layer.in_features, generator=generator) / 8
                up = torch.randn(layer.out_features, 3, generator=generator)
                if kohya:
                    name = KOHYA[part] + path.replace(".", "_")
                    tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                    tensors[f"{name}.alpha"] = torch.tensor(2.0)
                else:
                    name = f"{part}.{'' if part == 'unet' else 'text_model.'}{path}"
                    tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


@pytest.mark.parametrize(("is_xl", "kohya"), [(True, True), (False, False)])
def test_a_lora_for_unet_and_text_encoders_equals_diffusers(make, tmp_path, sd_model, xl_model, is_xl, kohya):
    folder = xl_model if is_xl else sd_model
    kind, more = (StableDiffusionXLPipeline, {}) if is_xl else (StableDiffusionPipeline, {"safety_checker": None})
    pipeline = kind.from_pretrained(folder, **more)
    tensors = lora_for(pipeline, kohya)
    file = write_tensors(tmp_path, "lora.safetensors", tensors)

    def generate_pixels(**changed):
        make(folder, **changed)
        return np.asarray(Image.open(tmp_path / "out.png")) / 255

    def run_diffusers():
        seed = torch.Generator("cpu").manual_seed(5)
        return pipeline(
            "a hill", width=64, height=64, num_inference_steps=3, guidance_scale=3.0, generator=seed, output_type="np"
        ).images[0]

    pipeline.load_lora_weights(dict(tensors), adapter_name="test")
    pipeline.set_adapters(["test"], [0.8])
    found = generate_pixels(lora=(f"{file}:0.8",))
    np.testing.assert_allclose(found, run_diffusers(), atol=0.6 / 255)
    unet_alone = {name: tensor for name, tensor in tensors.items() if name.startswith(("unet.", "lora_unet_"))}
    without_text = generate_pixels(lora=(f"{write_tensors(tmp_path, 'unet.safetensors', unet_alone)}:0.8",))
    assert np.abs(found - without_text).max() > 1.5 / 255


def test_a_lora_for_a_missing_encoder_is_rejected_before_the_unet_is_read(make, tmp_path, sd_model):
    tensors = {f"lora_te2_text_model_x.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    with pytest.raises(DataError, match="it changes text_encoder_2, which the model does not have"):
        make(sd_model, lora=(write_tensors(tmp_path, "lora.safetensors", tensors),))
    assert not (tmp_path / "out.png").exists()


def test_a_textual_inversion_acts_where_its_token_is(make, tmp_path, xl_model):
    tensors = {key: torch.full((2, TEXT_WIDTH), 2.0) for key in ("clip_l", "clip_g")}
    file = write_tensors(tmp_path, "style.safetensors", tensors)

    def generate_pixels(prompt, *inversions):
        listener = make(xl_model, prompt, textual_inversion=inversions)
        return np.asarray(Image.open(tmp_path / "out.png")), get_notices(listener)

    plain, _ = generate_pixels("a style hill")
    ours, messages = generate_pixels("a style hill", file)
    assert (plain != ours).any() and not messages
    unused, messages = generate_pixels("a style hill", f"{file}:<other>")
    assert (unused == plain).all() and len(messages) == 1 and "'<other>'" in messages[0]


def test_the_ignored_ends_of_both_prompts_are_reported(make, sd_model):
    messages = get_notices(make(sd_model, "x" * 75 + " tail", negative_prompt="y" * 80))
    prompt, negative_prompt = messages
    assert prompt.startswith("The prompt") and "77" in prompt and "'tail'" in prompt
    assert negative_prompt.startswith("The negative prompt") and "'yyyyy'" in negative_prompt


def test_clip_skip_changes_the_image_and_is_in_the_file(make, tmp_path, sd_model):
    make(sd_model)
    plain, info = np.asarray(Image.open(tmp_path / "out.png")), read_info(tmp_path / "out.png")
    make(sd_model, clip_skip=2)
    skipped, skipped_info = np.asarray(Image.open(tmp_path / "out.png")), read_info(tmp_path / "out.png")
    assert (plain != skipped).any() and "Clip skip" not in info.parameters
    assert ", Clip skip: 2, " in skipped_info.parameters and skipped_info.request["clip_skip"] == 2


def test_commands_of_other_tools_are_reported_once(make, sd_model):
    messages = get_notices(make(sd_model, "a (hill:1.2) (old)", negative_prompt="[blur], (hill:1.2)"))
    assert (
        len(messages) == 1 and "'(hill:1.2)', '[blur]'. --strict-prompt" in messages[0] and "(old)" not in messages[0]
    )
    assert get_notices(make(sd_model, "a hill (old)")) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": "a (hill:1.2)"}, "prompt contains '(hill:1.2)'"),
        ({"prompt": "a hill (old)"}, "prompt contains '(old)'"),
        (
            {"negative_prompt": "[a] [b] [c] [d] [e]"},
            "--negative-prompt contains '[a]', '[b]', '[c]', '[d]', ..., which",
        ),
    ],
)
def test_a_strict_prompt_rejects_commands(make, tmp_path, changed, message):
    with pytest.raises(UsageError) as caught:
        make("no such model", strict_prompt=True, **changed)
    assert message in caught.value.message and "--no-strict-prompt" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_strict_prompt_of_plain_words_is_accepted(make, sd_model):
    assert make(sd_model, r"a hill, \(old\), 16:9", strict_prompt=True).of(StageFinished)
