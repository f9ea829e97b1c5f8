"""Scripts and units in docs/cron.md are valid for shells, systemd and this program."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from linfusion_cli.cli.app import app
from tests.support.system_packages import needs

TEXT = (Path(__file__).parents[2] / "docs" / "cron.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
PROGRAM = "/usr/local/bin/linfusion"


def find_blocks(language: str) -> list[str]:
    return [text for found, text in BLOCKS if found == language]


def find_cron_commands() -> list[str]:
    """Return the commands that cron passes to the shell. An unescaped % would end a command early."""
    lines = [line for line in find_blocks("crontab")[0].splitlines() if re.match(r"[\d*]", line)]
    commands = [line.split(maxsplit=5)[5] for line in lines]
    assert not any(re.search(r"(?<!\\)%", command) for command in commands)
    return [command.replace("\\%", "%") for command in commands]


def find_loop() -> str:
    return next(text for text in find_blocks("sh") if "until " in text)


def find_array_script() -> str:
    return next(text for text in find_blocks("sh") if "#SBATCH" in text)


SCRIPTS = [*find_blocks("sh"), *find_cron_commands()]
UNIT_COMMANDS = [
    re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1] for unit in find_blocks("ini") if "ExecStart" in unit
]


def test_the_document_has_all_examples():
    assert len(find_blocks("sh")) == 2 and len(find_cron_commands()) == 3
    assert len(find_blocks("ini")) == 3 and len(UNIT_COMMANDS) == 2


@pytest.mark.parametrize("shell", ["sh", pytest.param("dash", marks=needs("dash")), "bash"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_shells_parse_it(script, shell):
    done = subprocess.run([shell, "-n", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def find_commands(script: str) -> Iterator[list[str]]:
    """Yield the words of each `linfusion` command in a script."""
    lexer = shlex.shlex(script.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split, words = True, []
    for word in [*lexer, ";"]:
        if words and (word == "do" or not set(word) - set(";|&<>(){}")):
            yield words
            words = []
        elif words or Path(word).name == "linfusion":
            words.append(word)


@pytest.mark.parametrize("script", [*SCRIPTS, *UNIT_COMMANDS])
def test_every_command_and_option_exists(script):
    commands = get_command(app).commands
    (words,) = list(find_commands(script))
    known = {name for option in commands[words[1]].params for name in option.opts}
    given = {word.split("=")[0] for word in words if word.startswith("-")}
    assert len(given) >= 3 and given <= known


@needs("systemd-analyze")
def test_systemd_accepts_the_units(tmp_path):
    names = []
    for text in find_blocks("ini"):
        names.append(re.match(r"# (\S+)\n", text)[1])
        (tmp_path / names[-1]).write_text(text.replace(PROGRAM, "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(f"./{name}" for name in names)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not [line for line in done.stderr.splitlines() if "linfusion-" in line]


def write_fake_program(folder: Path, name: str, text: str) -> None:
    """Write an executable script that precedes other programs of this name on PATH."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run_with_fakes(folder: Path, script: str, **environ: str) -> subprocess.CompletedProcess:
    environ |= {"PATH": f"{folder}{os.pathsep}{os.defpath}", "PAUSE_SEC": "0"}
    return subprocess.run(["sh", "-c", script], cwd=folder, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("codes", "code", "runs"), [("75 143 129 138 140 0", 0, 6), ("75 73 0", 73, 2), ("130 0", 130, 1), ("0", 0, 1)]
)
def test_the_loop_restarts_runs_that_can_be_resumed(tmp_path, codes, code, runs):
    write_fake_program(tmp_path, "linfusion", f'echo >> runs; n=$(wc -l < runs); set -- {codes}; eval "exit \\$$n"')
    done = run_with_fakes(tmp_path, find_loop())
    assert done.returncode == code and len((tmp_path / "runs").read_text()) == runs, done.stderr


@pytest.mark.parametrize(
    ("code", "requeued"),
    [(0, False), (3, False), (65, False), (130, False), (75, True), (138, True), (140, True), (143, True)],
)
def test_an_array_task_requeues_itself_or_ends_with_the_exit_code(tmp_path, code, requeued):
    write_fake_program(tmp_path, "linfusion", f'printf "%s\\n" "$@" > given; exit {code}')
    write_fake_program(tmp_path, "srun", 'exec "$@"')
    write_fake_program(tmp_path, "scontrol", 'echo "$@" > requeued')
    # The last task of an array has the id of the array: requeueing that id would requeue all tasks.
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    array |= {"SLURM_JOB_ID": "4711", "SLURM_ARRAY_JOB_ID": "4711"}
    done = run_with_fakes(tmp_path, find_array_script(), **array)
    given = (tmp_path / "given").read_text().splitlines()
    assert "3/4" in given and "pictures-3.log" in given
    if requeued:
        assert (done.returncode, (tmp_path / "requeued").read_text()) == (0, "requeue 4711_3\n")
    else:
        assert done.returncode == code and not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_a_crontab_line_generates_an_image_in_crons_environment(tmp_path):
    """Run the first line with the demo model instead of SDXL."""
    (tmp_path / "pictures").mkdir()
    command = find_cron_commands()[0].replace("--preset sdxl --size 4096", "--preset demo --size 64 --steps 1")
    write_fake_program(
        tmp_path,
        "linfusion",
        f'PYTHONPATH={shlex.quote(os.pathsep.join(sys.path))} exec {sys.executable} -m linfusion_cli "$@"',
    )
    command = command.replace(" linfusion ", f" {tmp_path}/linfusion ")
    environ = {"HOME": str(tmp_path), "LOGNAME": "cron", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"}
    done = subprocess.run(
        ["/bin/sh", "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (image,) = (tmp_path / "pictures").glob("valley-*.tif")
    assert re.fullmatch(r"valley-\d{4}-\d\d-\d\d\.tif", image.name)
    assert " ended: complete, exit code 0, " in (tmp_path / "pictures" / "night.log").read_text()
