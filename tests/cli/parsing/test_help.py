"""The help of all commands: panels, defaults, literal text, and lines that fit the terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from linfusion_cli.settings.setting import PANELS
from linfusion_cli.settings.table import select_options

COMMANDS = [
    *("generate", "upscale", "batch", "decode", "plan", "info", "schema", "doctor", "help"),
    *("presets", "presets list", "presets show", "models", "models list", "models pull", "models check"),
]
MOST_USED = [
    *("--size", "--output", "--preset", "--model", "--download", "--negative-prompt", "--seed", "--steps"),
    *("--guidance-scale", "--lora", "--overwrite", "--time-limit"),
]


def test_a_bare_command_prints_the_help_and_succeeds(cli):
    code, out, err = cli()
    assert (code, err) == (0, "") and out.startswith("Usage: linfusion [OPTIONS] COMMAND")
    assert all(f"  {name.split()[0]} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_the_same_for_h_and_for_the_command_help(cli, command):
    code, out, err = cli(*command.split(), "--help")
    assert (code, err) == (0, "") and out.startswith(f"Usage: linfusion {command} ")
    assert cli(*command.split(), "-h") == (code, out, err)
    assert cli("help", *command.split()) == (code, out, err)


@pytest.mark.parametrize("columns", [30, 50, 80, 200])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_line_fits_the_terminal(cli, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = cli(*command.split(), "--help")
    options, _, examples = out.partition("Examples:")
    # Long choices and the commands of the examples are copied from here: they are not broken.
    lines = [line for line in options.splitlines() if not re.fullmatch(r"\s+(--)?[\w|\[\]<>…:,.-]+", line)]
    assert max(map(len, lines)) <= min(columns, 100)
    assert all(line.startswith("  linfusion ") for line in examples.strip("\n").splitlines())


def test_the_panels_are_in_order_and_the_most_used_options_first(cli):
    _, out, _ = cli("generate", "--help")
    headings = re.findall(r"^([A-Z][^:\n]+):$", out, re.MULTILINE)
    assert headings == ["Arguments", *PANELS, "Options", "Examples"]
    panel = out[out.index("Most used:") : out.index("Prompt and guidance:")]
    assert re.findall(r"^  (?:-o, )?(--[a-z-]+)", panel, re.MULTILINE) == MOST_USED


@pytest.mark.parametrize("command", ["generate", "upscale", "plan", "batch", "decode"])
def test_every_setting_of_a_command_is_in_its_help_with_a_placeholder(cli, command):
    _, out, _ = cli(command, "--help")
    for setting in select_options(command):
        if command not in setting.argument_of:
            placeholder = r"(?= |$|\n)" if setting.is_switch else r" \S"
            assert re.search(rf"^  (-\w, )?{setting.flag}{placeholder}", out, re.MULTILINE), setting.flag


def test_defaults_choices_and_brackets_are_printed_literally(cli):
    _, out, _ = cli("generate", "-h")
    words = " ".join(out.split())
    for text in ("[default: 30]", "--bits 8|16", "OWNER/REPO[@REVISION]", "--steps N[,N…]", "[default: 0]"):
        assert text in words
    _, out, _ = cli("help", "batch")
    assert "[[job]]" in out and "[required]" in out


def test_decode_shows_no_defaults_because_the_run_decides_them(cli):
    assert "[default:" not in cli("decode", "--help")[1]


@pytest.mark.parametrize("names", [("nope",), ("models", "nope"), ("generate", "x")])
def test_help_of_an_unknown_command_names_the_list(cli, names):
    code, out, err = cli("help", *names)
    assert code == 2 and not out and "linfusion help" in err and " ".join(names) in err


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}, {}])
def test_help_has_no_escape_sequences_unless_a_terminal_shows_them(variables):
    environment = {"PATH": os.environ["PATH"], "COLUMNS": "50"} | variables
    done = run_in_terminal([sys.executable, "-m", "linfusion_cli", "generate", "--help"], environment)
    assert "--guidance-scale" in done and "\x1b" not in done


def test_headings_are_bold_on_a_terminal():
    environment = {"PATH": os.environ["PATH"], "TERM": "xterm"}
    assert "\x1b[1mMost used:\x1b[0m" in run_in_terminal(
        [sys.executable, "-m", "linfusion_cli", "generate", "-h"], environment
    )


def run_in_terminal(command: list[str], environment: dict[str, str]) -> str:
    """Return what a program writes to a terminal."""
    ours, its = os.openpty()
    with subprocess.Popen(command, stdout=its, stderr=its, stdin=its, env=environment) as process:
        os.close(its)
        parts = []
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the program has closed the terminal
                break
            if not part:
                break
            parts.append(part)
        assert process.wait() == 0
    os.close(ours)
    return b"".join(parts).decode()


def test_help_imports_neither_torch_nor_numpy():
    code = (
        "import sys\nfrom linfusion_cli.cli import app\nsys.argv = ['linfusion', 'generate', '--help']\n"
        "assert app.run_app() == 0\n"
        "print(sorted({'torch', 'numpy', 'diffusers', 'transformers', 'PIL'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
