import dataclasses
import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from linfusion_cli.images import (
    build_srgb_profile,
    build_xmp_packet,
    format_a1111_parameters,
    open_sink,
    read_info,
    remove_prompt_metadata,
    serialize_request,
)
from tests.images.conftest import PROMPT, make_image

HOSTILE = [
    PROMPT,
    "",
    "[bold]brackets[/bold] 'a' \"b\"",
    "\0\x01\x1f\x7f\x85\ufffe\uffff",
    "lone \udcff surrogate",
    "a\r\nb\rc\n\n",
    "👨‍👩‍👧 \U0010ffff",
    "Steps: 3, Seed: 1\nNegative prompt: x\nSteps: 9",
]


def format_settings(prompt, negative_prompt=""):
    return format_a1111_parameters(
        prompt, negative_prompt, steps=4, sampler="Euler", cfg_scale=5.0, seed=1, size_px=(64, 32),
        model="a, b", version="1", model_hash="abc", extra={"Method": "sdedit"},
    )  # fmt: skip


def test_a1111_layout():
    assert format_settings("a cat", "dog").split("\n") == [
        "a cat",
        "Negative prompt: dog",
        "Steps: 4, Sampler: Euler, CFG scale: 5.0, Seed: 1, Size: 64x32, Model hash: abc, "
        'Model: "a, b", Method: sdedit, Version: 1',
    ]
    assert format_settings("a cat").count("\n") == 1


@pytest.mark.parametrize("format", ["tiff", "png", "jpeg"])
@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_any_prompt_comes_back(tmp_path, info, format, prompt):
    info = dataclasses.replace(info, prompt=prompt, request={"prompt": prompt}, parameters=format_settings(prompt))
    sink = open_sink(tmp_path / "out", format, (8, 8), 8, info)
    sink.write(make_image(8, 8))
    sink.close()
    result = read_info(tmp_path / "out")
    assert result.request == {"prompt": prompt}
    assert result.parameters.endswith("Version: 1")
    if prompt == PROMPT and format != "tiff":  # XML cannot hold control characters
        assert result.parameters == info.parameters
    assert "🐱 [cat]" in result.parameters or prompt != PROMPT


@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_xmp_is_xml(info, prompt):
    packet = build_xmp_packet(dataclasses.replace(info, prompt=prompt))
    root = ElementTree.fromstring(packet)
    text = "".join(root.itertext())
    assert "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia" in text
    assert info.software in text


def test_request_json_is_ascii(info):
    text = serialize_request(info)
    assert text.isascii()
    assert json.loads(text) == {"file_sha256": "0" * 64} | info.request


@pytest.mark.parametrize("prompt", ["secret", "secret\nSteps: 1, secret"])
def test_removed_prompts_are_in_no_part_of_the_file(tmp_path, info, prompt):
    request = {"prompt": prompt, "negative_prompt": prompt, "more": [{"prompt_2": prompt}], "prompt_metadata": False}
    info = dataclasses.replace(
        info, request=request, prompt=prompt, negative_prompt=prompt, parameters=format_settings(prompt, prompt)
    )
    bare = remove_prompt_metadata(info)
    assert bare.request == {"more": [{}], "prompt_metadata": False}
    assert bare.parameters.startswith("Steps: 4, Sampler")
    for format in ("tiff", "png", "jpeg"):
        sink = open_sink(tmp_path / format, format, (8, 8), 8, bare)
        sink.write(make_image(8, 8))
        sink.close()
        content = (tmp_path / format).read_bytes()
        assert b"secret" not in content
        assert "secret".encode("utf-16-be") not in content


def test_the_profile_is_the_same_in_every_process():
    code = (
        "import sys; from linfusion_cli.images import build_srgb_profile; sys.stdout.buffer.write(build_srgb_profile())"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    assert other == build_srgb_profile()
    from io import BytesIO

    from PIL import ImageCms

    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(BytesIO(other)))
