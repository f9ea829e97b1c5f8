import json
import os
import pty
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime

import pytest

from linfusion_cli.cli.output import render
from linfusion_cli.core.events import Notice, Planned, StageAdvanced, StageFinished, StageStarted
from linfusion_cli.core.geometry import Size
from linfusion_cli.core.report import RunReport, StageReport


def run_stage(observer, pause: float = 0.0) -> None:
    observer(Notice("mind the [gap] 😀"))
    observer(StageStarted("4x", Size(1024, 512), 8, "steps"))
    observer(StageAdvanced(2))
    time.sleep(pause)
    observer(StageFinished(65.0))


def texts(lines: str) -> list[str]:
    """What lines say after their time, which must be one with an offset, of now."""
    found = [line.split(" ", 1) for line in lines.splitlines()]
    for stamp, _ in found:
        moment = datetime.fromisoformat(stamp)
        assert stamp[10] == "T" and abs(datetime.now(moment.tzinfo) - moment).total_seconds() < 60
    return [text for _, text in found]


def test_a_log_has_a_line_per_phase_each_with_its_time(capsys):
    with render.watching(quiet=False) as observer:
        run_stage(observer)
    assert texts(capsys.readouterr().err) == ["linfusion: mind the [gap] 😀", "4x 1024x512: 1 min 05 s"]


def test_the_offset_is_that_of_the_machine(capsys, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        render.tell("x")
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    err = capsys.readouterr().err
    assert "+05:45 x" in err and texts(err) == ["x"]


def test_what_comes_before_the_phases_is_one_line_and_what_takes_no_time_none(capsys):
    with render.watching(quiet=False) as observer:
        for name, size, seconds, unit in (
            ("start", None, 3.0, "start"),
            ("models", None, 2.5, "models"),
            ("base", Size(64, 64), 0.01, "steps"),
            ("decode", Size(64, 64), 0.01, "rows"),
            ("prompt", None, 0.02, "prompts"),
            ("encode", Size(128, 64), 6.0, "rows"),
        ):
            observer(StageStarted(name, size, 1, unit))
            observer(StageFinished(seconds))
    assert texts(capsys.readouterr().err) == ["ready: 5.5 s", "base 64x64: 0.0 s", "encode 128x64: 6.0 s"]


def test_a_log_is_never_silent_for_long(capsys, monkeypatch):
    monkeypatch.setattr(render, "QUIET_SEC", 1.5)
    with render.watching(quiet=False) as observer:
        run_stage(observer, pause=2.5)
    lines = capsys.readouterr().err.splitlines()
    assert "4x 1024x512: 2/8 steps" in lines[1] and lines[1].endswith(" left")


def test_quiet_keeps_notices(capsys):
    with render.watching(quiet=True) as observer:
        run_stage(observer)
    assert texts(capsys.readouterr().err) == ["linfusion: mind the [gap] 😀"]


def test_a_terminal_gets_bars(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with render.watching(quiet=False) as observer:
        run_stage(observer)
    err = capsys.readouterr().err
    assert "mind the [gap] 😀" in err and "4x 1024x512" in err and "8/8 steps" in err


def test_what_a_run_will_take_is_said_in_one_line(capsys):
    with render.watching(quiet=False) as observer:
        observer(Planned(3725.0, 4 << 30, 17 << 30))
        observer(Planned(3.0, 1 << 30, None))
    err = capsys.readouterr().err
    assert "expected: about 1 h 02 min, 4.0 GiB of memory and 17.0 GiB of the GPU's\n" in err
    assert "expected: about 3.0 s, 1.0 GiB of memory\n" in err
    with render.watching(quiet=True) as observer:
        observer(Planned(3.0, 1 << 30, None))
    assert capsys.readouterr().err == ""


@pytest.fixture
def report():
    report = RunReport({}, {}, {}, {}, size=Size(64, 64), format="png", file_bytes=2048, total_seconds=100.0)
    report.output = "a\nb.png"
    report.stages = [StageReport("base", "denoise", Size(64, 64), 10.0, 20, 3 << 30, 1 << 30)]
    return report


def test_on_a_terminal_a_table_shows_what_was_measured(capsys, monkeypatch, report):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    render.show_report(report, quiet=False)
    err = capsys.readouterr().err
    for text in ("base", "64x64", "2.00", "3.0 GiB", "1.0 GiB", "1 min 40 s", "2.0 KiB"):
        assert text in err


def test_elsewhere_one_line_does(capsys, report):
    render.show_report(report, quiet=False)
    line = "complete: a\\nb.png, 2.0 KiB in 1 min 40 s, 3.0 GiB of memory, 1.0 GiB of the GPU's"
    assert texts(capsys.readouterr().err) == [line]
    render.show_report(report, quiet=True)
    assert capsys.readouterr().err == ""


NOISY = """
import ctypes, logging, os, sys, warnings
import linfusion_cli.jobs.story as story
prepare = story.prepare
def noisy(*arguments):
    print("printed")
    ctypes.CDLL(None).puts(b"put")
    ctypes.CDLL(None).fflush(None)
    os.system("echo spawned")
    warnings.warn("warned")
    logging.basicConfig(stream=sys.stdout)
    logging.error("logged")
    return prepare(*arguments)
story.prepare = noisy
from linfusion_cli.cli.app import main
main()
"""


def noisy(tmp_path, model, *arguments, stderr=subprocess.PIPE):
    """A run with libraries that print, in its own process."""
    options = ("--model", str(model), "--size", "64", "--steps", "1", "-o", "a.png", "--json")
    command = [sys.executable, "-c", NOISY, "generate", "x", *options, *arguments]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        command, cwd=tmp_path, env=environ, text=True, check=False, stdout=subprocess.PIPE, stderr=stderr
    )


def read_all(descriptor: int) -> str:
    """What a pseudo-terminal shows until whoever writes to it has gone."""
    shown = b""
    with suppress(OSError):
        while data := os.read(descriptor, 1 << 16):
            shown += data
    os.close(descriptor)
    return shown.decode()


def test_json_is_alone_on_stdout_and_a_terminal_gets_bars_and_the_log_lines(tmp_path, xl_model):
    ours, theirs = pty.openpty()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_all, ours)
        done = noisy(tmp_path, xl_model, "--log-file", "log", stderr=theirs)
        os.close(theirs)
    shown = reading.result()
    assert done.returncode == 0 and json.loads(done.stdout)["output"] == "a.png", shown
    for word in ("printed", "put", "spawned", "warned", "logged", "host peak", "1/1 steps"):
        assert word in shown
    assert not re.search(r"\d\d:\d\d:\d\d\+\d\d:\d\d", shown)
    assert re.search(r"\d\d:\d\d:\d\d\+\d\d:\d\d \d+ base .*: ", (tmp_path / "log").read_text())


@pytest.mark.slow
def test_a_refused_run_leaves_stdout_empty(tmp_path, xl_model):
    done = noisy(tmp_path, xl_model, "--ram", "1MiB")
    assert (done.returncode, done.stdout) == (71, "") and " linfusion: " in done.stderr
