"""No command opens a network connection, except `models pull` and with --download."""

import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from tests.support.fake_hub import COMMIT
from tests.support.small_models import write_small_tokenizer

WITHOUT_NETWORK = """
import socket, sys
log_path = sys.argv[1]
def refuse(*given, **_):
    with open(log_path, "a") as log:
        print(given[-2:], file=log)
    raise OSError("this test has no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
sys.argv = ["linfusion", *sys.argv[2:]]
from linfusion_cli.cli.app import main
main()
"""
SMALL = ("--size", "64", "--steps", "1", "--strength", "1", "-q", "--overwrite", "-o", "out.png")


@pytest.fixture(scope="module")
def home(tmp_path_factory, sd_model):
    """A folder with an image, and a Hugging Face cache with a model without LinFusion weights."""
    folder = tmp_path_factory.mktemp("home")
    Image.new("RGB", (80, 64), "green").save(folder / "photo.png")
    repository = folder / "hub" / "models--someone--sd"
    shutil.copytree(sd_model, repository / "snapshots" / COMMIT)
    write_small_tokenizer(repository / "snapshots" / COMMIT / "tokenizer")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return folder


@pytest.fixture
def offline(home, tmp_path):
    """Return a function that runs the program without offline variables -> exit code, stderr."""

    def run(*arguments):
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LINFUSION_"))}
        environ |= {"HF_HOME": str(home), "XDG_CONFIG_HOME": str(tmp_path)}
        log = tmp_path / "connections"
        command = [sys.executable, "-c", WITHOUT_NETWORK, str(log), *arguments]
        done = subprocess.run(command, cwd=home, env=environ, capture_output=True, text=True, timeout=300)
        assert not log.exists(), log.read_text()
        return done.returncode, done.stderr

    return run


def slow(arguments: tuple[str, ...], code: int):
    """Mark a case as slow: its process imports torch and diffusers."""
    return pytest.param(arguments, code, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("generate", "a sea", "--preset", "demo", *SMALL), 0),
        slow(("generate", "a sea", "--model", "someone/sd", "--linfusion", "none", *SMALL), 0),
        slow(
            (
                "generate",
                "a sea",
                "--model",
                f"someone/sd@{COMMIT}",
                "--vae",
                "someone/sd",
                "--linfusion",
                "none",
                *SMALL,
            ),
            0,
        ),
        slow(("generate", "a sea", "--model", "someone/sd@elsewhere", *SMALL), 69),
        slow(("generate", "a sea", "--model", "someone/sd", "--attention", "linear", *SMALL), 69),
        slow(("generate", "a sea", "--model", "someone/sd", "--lora", "someone/lora", *SMALL), 69),
        slow(("generate", "a sea", "--preset", "sdxl", *SMALL), 69),
        slow(("upscale", "photo.png", "--preset", "demo", "--size", "96", "--steps", "1", "-q", "-o", "large.png"), 0),
        slow(("plan", "a sea", "--model", "someone/sd", "--linfusion", "none", "--size", "128"), 0),
        slow(("plan", "a sea", "--preset", "sdxl", "--size", "16384", "--gpu", "rtx4090", "--ram", "64GiB"), 0),
        (("models", "list"), 0),
        slow(("models", "check", "someone/sd"), 0),
        slow(("models", "check", "someone/else"), 69),
        (("doctor",), 0),
        (("presets", "list"), 0),
        (("info", "photo.png"), 0),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, tuple) else str(value),
)
def test_no_connection_is_opened(offline, arguments, code):
    exit_code, err = offline(*arguments)
    assert exit_code == code, err


@pytest.mark.slow
def test_a_connection_is_detected(offline):
    with pytest.raises(AssertionError, match="huggingface"):
        offline("models", "pull", "-q", "someone/else")
