"""Images of version 0.1, whose metadata have no schema number, are recognised, so that batches do not repeat them."""

import json
from pathlib import Path

import pytest

from linfusion_cli.core.geometry import Size
from linfusion_cli.run.inputs.provenance import build_image_metadata
from linfusion_cli.run.outputs.existing import find_identity
from tests.support.requests import make_request

REQUESTS = json.loads((Path(__file__).parent / "requests-0.1.json").read_text())  # written by version 0.1
MADE_WITH = {"weights": [], "dtypes": []}


def build_metadata(kind: str, **changed):
    """Return the metadata that this version writes for the same request."""
    values = {"prompt": "", "size": Size(80, 64), "output": "elsewhere.png", "model": "demo"}
    if kind == "upscale":
        values |= {"image": "in.png", "background": "white"}
    else:
        values |= {"prompt": "a lake", "seed": 7, "base_size": Size(64, 64), "guidance_interval": (0.28, float("inf"))}
        values |= {"lora": ("x.safetensors:0.8", "y.safetensors"), "textual_inversion": ("hat.safetensors:<hat>",)}
        values |= {"ip_adapter": ("adapter.safetensors",), "ip_image": ("face.png",), "control_type": ("depth",)}
        values |= {"controlnet": ("canny", "union"), "control_image": ("edges.png", "depth.png")}
        values |= {"control_scale": (0.5,)}
    return json.loads(json.dumps(build_image_metadata(make_request(**values | changed), [], [])))


@pytest.mark.parametrize("kind", REQUESTS)
def test_metadata_of_version_0_1_are_those_of_the_same_request(kind):
    assert "schema" not in REQUESTS[kind] and build_metadata(kind)["schema"] == 2
    identity = find_identity(REQUESTS[kind] | MADE_WITH)
    assert identity is not None and identity == find_identity(build_metadata(kind))


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("generate", {"seed": 8}),
        ("generate", {"control_scale": (0.6,)}),
        ("generate", {"lora": ("x.safetensors:0.7", "y.safetensors")}),
        ("upscale", {"background": "black"}),
    ],
)
def test_metadata_of_another_request_differ(kind, changed):
    assert find_identity(REQUESTS[kind] | MADE_WITH) != find_identity(build_metadata(kind, **changed))
