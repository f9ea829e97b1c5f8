import json
from pathlib import Path

import pytest

from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.settings.checks import list_errors
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.request_json import SCHEMA, execution_to_json, request_to_json, values_from_json
from linfusion_cli.settings.table import flatten_request
from tests.support.requests import make_request

CONTROL = {"controlnet": ("canny",), "control_image": (Path("edges.png"),), "control_scale": (0.5,)}


def request(**changed) -> Request:
    return make_request(**{"prompt": "a", "size": Size(64, 65), "output": Path("a.png"), "model": "demo"} | changed)


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
        ("clip_skip", 0),
        ("ip_adapter", (" ",)),
        ("ip_image", ("a.png",)),
        ("ip_scale", (1.0, 0.5)),
        ("ip_scale", (float("nan"),)),
        ("ip_image_encoder", ""),
        ("controlnet", (" ",)),
        ("control_image", ("a.png",)),
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
    error = next(error for error in list_errors(caught.value) if getattr(error, "setting", None) == field)
    assert error.hint


def test_a_prompt_that_is_no_text_is_named():
    with pytest.raises(UsageError, match="The prompt 'caf"):
        request(prompt="caf\udce9")


def test_json_has_every_setting_either_as_identity_or_as_execution():
    given = request(preview=Path("p.jpg"), lora=("a, b.safetensors:0.5",), seed=7, **CONTROL)
    identity, execution = (json.loads(json.dumps(to_json(given))) for to_json in (request_to_json, execution_to_json))
    assert identity["schema"] == SCHEMA and "output" not in identity and "seed" not in execution
    assert (identity["size"], execution["output"], execution["preview"]) == ("64x65", "a.png", "p.jpg")
    assert identity["lora"] == [{"model": "a, b.safetensors", "weight": 0.5}]
    assert identity["controlnet"] == [{"model": "canny", "image": "edges.png", "scale": 0.5, "type": None}]
    assert {**flatten_request(given), **values_from_json(identity)} == flatten_request(given)
    assert identity.keys() | execution.keys() >= {"prompt", "device"}


def test_an_interval_without_an_upper_end_is_valid_json_and_read_back():
    written = request_to_json(request(guidance_interval=(0.28, float("inf"))))
    values = json.loads(json.dumps(written, allow_nan=False))
    assert values["guidance_interval"] == [0.28, "inf"]
    assert values_from_json(values)["guidance_interval"] == (0.28, float("inf"))
    assert request_to_json(request())["guidance_interval"] == []


def test_a_background_that_is_no_colour_is_refused_at_once():
    ask = {"image": Path("a.png"), "size": Size(128, 128), "output": Path("b.png"), "model": "demo"}
    assert make_request(**ask).source.background_rgb() is None
    assert make_request(**ask, background="#102030").source.background_rgb() == (16, 32, 48)
    with pytest.raises(UsageError, match="--background 'beige-ish'"):
        make_request(**ask, background="beige-ish")
