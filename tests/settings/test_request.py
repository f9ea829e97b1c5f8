import json
from pathlib import Path

import pytest

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.settings import PARSERS
from linfusion_cli.settings.request import GenerateRequest, UpscaleRequest


def request(**changed) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a", "size": Size(64, 65), "output": Path("a.png"), "model": "demo"} | changed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", (0,)),
        ("steps", (30, 1001)),
        ("steps", ()),
        ("seed", -1),
        ("seed", 2**63),
        ("strength", (1.5,)),
        ("strength", (0.3, float("nan"))),
        ("guidance_scale", (-1,)),
        ("guidance_rescale", 2),
        ("dpi", 0),
        ("dtype", "int8"),
        ("compression", "rar"),
        ("model", " "),
        ("negative_prompt", "\udcff"),
        ("lora", (" ",)),
        ("textual_inversion", ("a", "")),
        ("clip_skip", 0),
        ("ip_adapter", (" ",)),
        ("ip_image", ("a.png",)),
        ("ip_scale", ()),
        ("ip_scale", (1.0, 0.5)),
        ("ip_scale", (float("nan"),)),
        ("ip_image_encoder", ""),
        ("controlnet", (" ",)),
        ("control_image", ("a.png",)),
        ("control_scale", ()),
        ("control_scale", (float("nan"),)),
        ("control_scale", (1.0, 1.0)),
        ("control_phases", ()),
        ("control_phases", ("base", "-1")),
        ("attention", ("auto", "none")),
        ("scheduler", "heun"),
        ("timestep_spacing", "even"),
        ("upscaler", "esrgan"),
        ("upscale_space", "frequency"),
        ("cosine", (3, 1)),
        ("cosine", (3, 1, float("inf"))),
        ("blur_sigma", 0),
        ("dilated_min", 1.5),
        ("guidance_interval", (5.0, 0.3)),
        ("guidance_interval", (0.3, float("nan"))),
        ("guidance_interval", (0.3,)),
        ("guidance_interval", (float("inf"),)),
        ("guidance_interval", (float("inf"), float("inf"))),
        ("guidance_interval", (float("inf"), 1.0)),
        ("guidance_interval", (-float("inf"), 1.0)),
        ("guidance_interval", (0.3, 5.0, float("inf"))),
        ("dpi", float("inf")),
        ("dpi", float("nan")),
        ("guidance_scale", (float("inf"),)),
        ("guidance_rescale", float("nan")),
        ("strength", (-float("inf"),)),
        ("blur_sigma", float("inf")),
        ("dilated_min", float("nan")),
        ("checkpoint_every", float("inf")),
        ("crop_top_left", (-1, 0)),
        ("crop_top_left", (1,)),
    ],
)
def test_a_value_out_of_range_names_its_flag_and_a_way_out(field, value):
    with pytest.raises(UsageError, match="--" + field.replace("_", "-")) as caught:
        request(**{field: value})
    assert caught.value.hint and caught.value.setting == field


def test_a_prompt_that_is_no_text_is_named():
    with pytest.raises(UsageError, match="The prompt 'caf"):
        request(prompt="caf\udce9")


def test_json_holds_every_field():
    values = json.loads(json.dumps(request(preview=Path("p.jpg")).to_json()))
    assert set(values) == set(GenerateRequest.__dataclass_fields__)
    assert (values["size"], values["output"], values["preview"]) == ("64x65", "a.png", "p.jpg")


def test_an_interval_without_an_upper_end_is_valid_json_and_read_back():
    written = request(guidance_interval=(0.28, float("inf"))).to_json()
    values = json.loads(json.dumps(written, allow_nan=False))
    assert values["guidance_interval"] == [0.28, "inf"]
    assert PARSERS["guidance_interval"](values["guidance_interval"]) == (0.28, float("inf"))
    assert request().to_json()["guidance_interval"] == ()


def test_a_background_that_is_no_colour_is_refused_at_once():
    ask = {"image": Path("a.png"), "size": Size(128, 128), "output": Path("b.png"), "model": "demo"}
    assert UpscaleRequest(**ask).background_rgb() is None
    assert UpscaleRequest(**ask, background="#102030").background_rgb() == (16, 32, 48)
    with pytest.raises(UsageError, match="--background 'beige-ish'"):
        UpscaleRequest(**ask, background="beige-ish")
