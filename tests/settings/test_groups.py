"""LoRAs and textual inversions as text."""

import pytest

from linfusion_cli.settings.groups import parse_inversion, parse_lora, split_token, split_weight


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("lcm.safetensors", "lcm.safetensors", 1.0),
        ("lcm.safetensors:0.8", "lcm.safetensors", 0.8),
        ("owner/repo:-1", "owner/repo", -1.0),
        ("C:/loras/a:b.safetensors", "C:/loras/a:b.safetensors", 1.0),
        ("a:0.5:2", "a:0.5", 2.0),
        ("a:10", "a", 10.0),
        ("a:", "a:", 1.0),
        ("0.8", "0.8", 1.0),
    ],
)
def test_a_trailing_number_is_the_weight(text, name, weight):
    assert split_weight(text) == (name, weight)


@pytest.mark.parametrize("text", ["a:nan", "a:inf", "a:-inf", "a:1e999", "a:10.5", "a:-11", ":0.8", "", " "])
def test_invalid_weights_are_rejected(text):
    with pytest.raises(ValueError, match=r"FILE:WEIGHT|-10 to 10"):
        parse_lora(text)


@pytest.mark.parametrize(
    ("text", "name", "token"),
    [
        ("style.safetensors", "style.safetensors", None),
        ("style.safetensors:<cat-toy>", "style.safetensors", "<cat-toy>"),
        ("owner/repo:1.5", "owner/repo", "1.5"),
        ("owner/repo/a.safetensors: two words", "owner/repo/a.safetensors", " two words"),
        ("C:/styles/a.safetensors", "C:/styles/a.safetensors", None),
        ("C:\\a.safetensors", "C:\\a.safetensors", None),
        ("C:a.safetensors", "C:a.safetensors", None),
        ("C:/a.safetensors:x", "C:/a.safetensors", "x"),
    ],
)
def test_the_text_after_the_colon_is_the_token(text, name, token):
    assert split_token(text) == (name, token)


def test_a_colon_can_be_part_of_the_file_name(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "a:b").touch()
    assert split_token(f"{folder}/a:b") == (f"{folder}/a:b", None)
    assert split_token(f"{folder}/a:c") == (f"{folder}/a", "c")


@pytest.mark.parametrize("text", ["", " ", "a:", "a: ", ":token"])
def test_invalid_tokens_are_rejected(text):
    with pytest.raises(ValueError, match="FILE:TOKEN"):
        parse_inversion(text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [({"model": "a:b", "weight": 0.5}, "a:b:0.5"), ({"model": "a"}, "a"), ("a", "a"), ("a:1", "a")],
)
def test_a_lora_can_be_a_table(value, expected):
    assert str(parse_lora(value)) == expected


@pytest.mark.parametrize("value", [{"weight": 1}, {"model": "a", "scale": 1}, {"model": 3}, 3, None, ["a"]])
def test_other_values_are_no_lora(value):
    with pytest.raises(ValueError):
        parse_lora(value)
