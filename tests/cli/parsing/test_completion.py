"""TAB completes values: this asks the program as the completion script of bash does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def complete(words: str, **variables: str) -> list[str]:
    """Return what the program offers for the last of these words."""
    environment = {"PATH": os.environ["PATH"], "COMP_WORDS": words, "_LINFUSION_COMPLETE": "complete_bash"}
    number = str(len(words.split(" ")) - 1)
    command = [sys.executable, "-m", "linfusion_cli"]
    done = subprocess.run(
        command, env=environment | variables | {"COMP_CWORD": number}, capture_output=True, text=True, check=False
    )
    assert not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("linfusion generate --scheduler dpmpp-2m-", ["dpmpp-2m-karras", "dpmpp-2m-sde"]),
        ("linfusion generate --preset sdxl-l", ["sdxl-lcm", "sdxl-lightning"]),
        ("linfusion generate --attention original,l", ["original,linear"]),
        ("linfusion upscale --format ", ["tiff", "png", "jpeg"]),
        ("linfusion plan --gpu rtx409", ["rtx4090"]),
        ("linfusion plan --device c", ["cpu", "cuda"]),
        ("linfusion models pull sdxl-h", ["sdxl-hyper"]),
        ("linfusion presets show dem", ["demo"]),
        ("linfusion schema j", ["job"]),
        ("linfusion help up", ["upscale"]),
        ("linfusion generate --guidance-s", ["--guidance-scale"]),
        ("linfusion generate --output ", []),  # the shell completes files
    ],
)
def test_values_and_options_are_completed(words, expected):
    assert complete(words) == expected


def test_cached_models_and_own_presets_are_completed(tmp_path):
    (tmp_path / "hub" / "models--stabilityai--sdxl-turbo").mkdir(parents=True)
    (tmp_path / "hub" / "datasets--a--b").mkdir()
    (tmp_path / "team.toml").write_text("steps = 4")
    assert complete("linfusion generate --model ", HF_HOME=str(tmp_path)) == ["demo", "stabilityai/sdxl-turbo"]
    assert complete("linfusion models check stab", HF_HUB_CACHE=str(tmp_path / "hub")) == ["stabilityai/sdxl-turbo"]
    assert complete("linfusion batch --preset te", LINFUSION_PRESET_PATH=str(tmp_path)) == ["team"]


def test_a_broken_setup_completes_nothing_and_prints_no_error(tmp_path):
    (tmp_path / "file").touch()
    assert complete("linfusion generate --preset x", LINFUSION_PRESET_PATH=str(tmp_path / "file")) == []
    assert complete("linfusion generate --model x", HF_HOME=str(tmp_path / "file")) == []
