"""Standard output has results only; messages on stderr have timestamps unless it is a terminal."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from linfusion_cli.cli.output import streams
from tests.cli.output.test_progress import strip_timestamps


def test_timestamps_have_the_utc_offset_of_the_machine(capsys, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        streams.echo_line("x")
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    err = capsys.readouterr().err
    assert "+05:45 x" in err and strip_timestamps(err) == ["x"]


NOISY_PROGRAM = """
import ctypes, logging, os, sys, warnings
from linfusion_cli.run import pipeline
resolve_request = pipeline.resolve_request
def print_and_resolve(*arguments):
    print("printed")
    ctypes.CDLL(None).puts(b"put")
    ctypes.CDLL(None).fflush(None)
    os.system("echo spawned")
    warnings.warn("warned")
    logging.basicConfig(stream=sys.stdout)
    logging.error("logged")
    return resolve_request(*arguments)
pipeline.resolve_request = print_and_resolve
from linfusion_cli.cli.app import main
main()
"""


def run_noisy_program(tmp_path, model, *arguments, stderr=subprocess.PIPE):
    """Run `generate --json` in its own process, with libraries that print in every way."""
    options = ("--model", str(model), "--size", "64", "--steps", "1", "-o", "a.png", "--json")
    command = [sys.executable, "-c", NOISY_PROGRAM, "generate", "x", *options, *arguments]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        command, cwd=tmp_path, env=environ, text=True, check=False, stdout=subprocess.PIPE, stderr=stderr
    )


def read_all(descriptor: int) -> str:
    """Read the output of a pseudo-terminal until its writer closes it."""
    data = b""
    with suppress(OSError):
        while piece := os.read(descriptor, 1 << 16):
            data += piece
    os.close(descriptor)
    return data.decode()


def test_json_is_alone_on_stdout_and_a_terminal_gets_bars_and_the_log_lines(tmp_path, xl_model):
    reader, writer = pty.openpty()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_all, reader)
        done = run_noisy_program(tmp_path, xl_model, "--log-file", "log", stderr=writer)
        os.close(writer)
    err = reading.result()
    assert done.returncode == 0 and json.loads(done.stdout)["output"] == "a.png", err
    for word in ("printed", "put", "spawned", "warned", "logged", "host peak", "1/1 steps"):
        assert word in err
    assert not re.search(r"\d\d:\d\d:\d\d\+\d\d:\d\d", err)
    assert re.search(r"\d\d:\d\d:\d\d\+\d\d:\d\d \d+ denoise base .*: ", (tmp_path / "log").read_text())


@pytest.mark.slow
def test_a_refused_run_leaves_stdout_empty(tmp_path, xl_model):
    done = run_noisy_program(tmp_path, xl_model, "--ram", "1MiB")
    assert (done.returncode, done.stdout) == (71, "") and " linfusion: " in done.stderr
