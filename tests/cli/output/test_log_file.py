"""The log file: appended by several runs, rotated meanwhile, and safe against control characters."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linfusion_cli.cli.output import log_file
from linfusion_cli.core.errors import CannotCreateOutput

LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d) (\d+) (.+)")


def read_texts(path: Path) -> list[str]:
    """Return the texts of the lines of a log; each line must be complete and have time and process id."""
    data = path.read_bytes().decode()
    assert data.endswith("\n")
    return [LINE.fullmatch(line)[3] for line in data[:-1].split("\n")]


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def file(tmp_path, warnings):
    file = log_file.LogFile(tmp_path / "run.log", warnings.append)
    yield file
    file.close()


def test_a_log_is_appended_to(tmp_path, file):
    file.write("one")
    other = log_file.LogFile(tmp_path / "run.log", print)
    other.write("two")
    file.write("three")
    other.close()
    assert read_texts(tmp_path / "run.log") == ["one", "two", "three"]


def test_a_log_that_was_moved_is_created_again(tmp_path, file, warnings):
    file.write("one")
    (tmp_path / "run.log").rename(tmp_path / "run.log.1")
    file.write("two")
    (tmp_path / "run.log").rename(tmp_path / "run.log.2")
    (tmp_path / "run.log").write_text("")  # as logrotate's `create` does
    file.write("three")
    assert [read_texts(tmp_path / f"run.log{number}") for number in (".1", ".2", "")] == [["one"], ["two"], ["three"]]
    assert not warnings


def test_a_log_that_was_deleted_is_created_again(tmp_path, file, warnings):
    file.write("one")
    (tmp_path / "run.log").unlink()
    file.write("two")
    assert read_texts(tmp_path / "run.log") == ["two"] and not warnings


def test_a_log_that_was_truncated_continues_at_its_start(tmp_path, file):
    """As logrotate's `copytruncate` does."""
    file.write("one")
    os.truncate(tmp_path / "run.log", 0)
    file.write("two")
    assert read_texts(tmp_path / "run.log") == ["two"]


def test_lines_are_not_lost_if_a_log_cannot_be_created_again(tmp_path, file, warnings):
    file.write("one")
    (tmp_path / "run.log").rename(tmp_path / "old.log")
    (tmp_path / "run.log").mkdir()
    file.write("two")
    file.write("three")
    assert read_texts(tmp_path / "old.log") == ["one", "two", "three"]
    assert len(warnings) == 1 and "run.log'" in warnings[0] and "Is a directory" in warnings[0]


def test_a_rotated_log_leaks_no_descriptors(tmp_path, file):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        file.write("x")
        (tmp_path / "run.log").unlink()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_control_characters_cannot_forge_a_line(tmp_path, file):
    file.write("a\n2026-11-26T07:40:12+00:00 1 ended: complete\r\x1b[2K\x85\u2028\u202e\x00")
    file.write("猫\u3000👩\u200d🚀 caf\udce9 \ud800")
    forged, harmless = read_texts(tmp_path / "run.log")
    escaped = r"a\n2026-11-26T07:40:12+00:00 1 ended: complete\r\x1b[2K\x85\u2028\u202e\x00"
    assert forged == escaped
    assert harmless == "猫\u3000👩\u200d🚀 caf\\udce9 \\ud800"


def test_a_line_of_ten_megabytes_keeps_its_start_and_end(tmp_path, file):
    file.write("It begins " + "\n😀" * 3_000_000 + " and ends.")
    (line,) = read_texts(tmp_path / "run.log")
    assert line.startswith("It begins ") and line.endswith(" and ends.")
    assert (tmp_path / "run.log").stat().st_size < 4096


@pytest.mark.parametrize("name", ["no/such/run.log", "", ".", "pipe", "image.png"])
def test_a_log_that_cannot_be_opened_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # without a reader
    Path("image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(CannotCreateOutput, match="--log-file '"):
        log_file.open_log(Path(name), print)
    assert Path("image.png").stat().st_size == 16


def test_a_full_disk_is_one_warning(warnings):
    file = log_file.LogFile(Path("/dev/full"), warnings.append)
    file.write("one")
    file.write("two")
    file.close()
    assert len(warnings) == 1 and "'/dev/full'" in warnings[0] and "No space left on device" in warnings[0]


def test_an_incomplete_line_does_not_damage_the_next(tmp_path, file, warnings):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file.write("one")
    size = (tmp_path / "run.log").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, limits[1]))
    try:
        file.write("two is cut off by the limit")
        file.write("three is not written at all")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.write("four")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert len(lines) == 3 and len(warnings) == 1 and "No space left" in warnings[0]
    assert LINE.fullmatch(lines[0])[3] == "one" and LINE.fullmatch(lines[2])[3] == "four"


WRITER = """
import sys
from pathlib import Path
from linfusion_cli.cli.output.log_file import LogFile
log = LogFile(Path("run.log"), print)
for number in range(1500):
    log.write(f"{sys.argv[1]} {number} " + "x" * 900)
"""


def test_processes_that_share_a_rotated_log_write_all_lines_completely(tmp_path):
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [subprocess.Popen([sys.executable, "-c", WRITER, str(n)], cwd=tmp_path, env=environ) for n in range(3)]
    rotations = 0
    while any(run.poll() is None for run in runs):
        time.sleep(0.05)
        if (tmp_path / "run.log").exists() and (tmp_path / "run.log").stat().st_size:
            (tmp_path / "run.log").rename(tmp_path / f"run.log.{rotations}")
            rotations += 1
    assert all(run.returncode == 0 for run in runs) and rotations > 1
    written = sorted(text.rstrip("x ") for path in tmp_path.glob("run.log*") for text in read_texts(path))
    assert written == sorted(f"{run} {number}" for run in range(3) for number in range(1500))


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (0, "complete"),
        (3, "some jobs failed"),
        (73, "failed"),
        (75, "not complete, run it again"),
        (138, "stopped by SIGUSR1"),
        (140, "stopped by SIGUSR2"),
        (143, "stopped by SIGTERM"),
    ],
)
def test_the_last_line_states_how_a_run_ended(tmp_path, code, status):
    log_file.open_log(tmp_path / "run.log", print)
    log_file.close_log(code)
    log_file.write_log("the log is closed")
    started, ended = read_texts(tmp_path / "run.log")
    assert started.startswith("started: linfusion ") and ended.startswith(
        f"ended: {status}, exit code {code}, after 0."
    )


@pytest.fixture
def small(xl_model):
    """Options of a run that takes a second."""
    return "--model", xl_model, "--size", 64, "--steps", 1


def test_a_complete_and_a_refused_run_share_a_log(cli, tmp_path, small):
    options = ("generate", "a\nhill", *small, "-o", "a\nb.png", "--quiet", "--log-file", "run.log")
    assert cli(*options) == (0, "a\nb.png\n", "")
    code, out, err = cli(*options)
    assert (code, out) == (73, "") and len(err.splitlines()) == 1
    lines = read_texts(tmp_path / "run.log")
    ends = [text.split(",")[0] for text in lines if text.startswith("ended")]
    assert ends == ["ended: complete", "ended: failed"] and lines.count("output: a\\nb.png") == 2
    assert [text for text in lines if text.startswith(("ready", "estimate", "base 64x64: ", "complete: a\\nb.png, "))]
    assert lines[-2].startswith("linfusion: ") and "a\\nb.png" in lines[-2]


def test_a_log_that_cannot_be_opened_is_refused_before_any_work(cli, tmp_path, small):
    code, out, err = cli("generate", "x", *small, "-o", "a.png", "--log-file", "no/such/run.log")
    assert (code, out) == (73, "") and "--log-file 'no/such/run.log'" in err and "No such file" in err
    assert not list(tmp_path.iterdir())


def test_the_log_cannot_be_another_file_of_the_run(cli, tmp_path, small):
    code, _, err = cli("generate", "x", *small, "-o", "a.png", "--log-file", "a.png", "--overwrite")
    assert code == 2 and "--log-file 'a.png'" in err and "--output" in err


def test_a_log_on_a_full_disk_does_not_end_a_run(cli, small):
    code, out, err = cli("generate", "x", *small, "-o", "a.png", "-q", "--log-file", "/dev/full")
    assert (code, out) == (0, "a.png\n") and err.count("No space left on device") == 1 == len(err.splitlines())


def test_a_bug_is_in_the_log(cli, tmp_path, monkeypatch, small):
    def fail(*arguments):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("linfusion_cli.run.pipeline.resolve_request", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli("generate", "x", *small, "-o", "a.png", "--log-file", "run.log")[0] == 70
    *_, sentence, last = read_texts(tmp_path / "run.log")
    assert "(ZeroDivisionError)" in sentence and "Log: " in sentence
    assert last.startswith("ended: failed, exit code 70")


def start(tmp_path, *arguments, redirect="", **environ):
    """Start a run in a shell, with a minimal environment and `environ`."""
    command = [sys.executable, "-m", "linfusion_cli", *map(str, arguments)]
    environ = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)} | environ
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh", *command]
    return subprocess.Popen(shell, cwd=tmp_path, env=environ, stdout=-1, stderr=-1, stdin=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_signal_is_in_the_last_line_of_the_log(tmp_path, xl_model):
    options = ("--model", xl_model, "--size", 256, "--steps", 1000, "-o", "a.png", "--log-file", "run.log")
    run = start(tmp_path, "generate", "x", *options)
    while b" ready: " not in run.stderr.readline():
        assert run.poll() is None
    (tmp_path / "run.log").rename(tmp_path / "run.log.1")
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    sentence, last = read_texts(tmp_path / "run.log")
    assert (run.returncode, out) == (143, b"") and "Stopped by SIGTERM" in sentence
    assert last.startswith("ended: stopped by SIGTERM, exit code 143, after ")


@pytest.mark.slow
def test_a_c_locale_closed_streams_and_a_file_name_that_is_not_valid_text(tmp_path, small):
    name = b"caf\xe9 \xe7\x8c\xab\n.png".decode(errors="surrogateescape")
    options = (*small, "-o", name, "--log-file", "run.log", "--json")
    run = start(tmp_path, "generate", "猫\n", *options, redirect="<&- 2>&-", LC_ALL="C")
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, b"") and json.loads(out)["output"] == name
    assert "output: caf\\udce9 猫\\n.png" in read_texts(tmp_path / "run.log")
    assert os.path.exists(tmp_path / name)  # noqa: PTH110 - bytes that are not UTF-8


def test_a_prompt_that_is_not_valid_text_is_refused_in_the_log_too(cli, tmp_path, small):
    assert cli("generate", "caf\udce9\n", *small, "-o", "a.png", "--log-file", "run.log")[0] == 2
    *_, sentence, last = read_texts(tmp_path / "run.log")
    assert sentence.startswith("linfusion: The prompt 'caf\\udce9\\n' ") and "exit code 2," in last
