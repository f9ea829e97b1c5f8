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


def texts(path: Path) -> list[str]:
    """What the lines of a log say; each must be whole and of this form."""
    data = path.read_bytes().decode()
    assert data.endswith("\n")
    return [LINE.fullmatch(line)[3] for line in data[:-1].split("\n")]


@pytest.fixture
def complaints():
    return []


@pytest.fixture
def file(tmp_path, complaints):
    opened = log_file.LogFile(tmp_path / "run.log", complaints.append)
    yield opened
    opened.close()


def test_a_log_is_appended_to(tmp_path, file):
    file.write("one")
    other = log_file.LogFile(tmp_path / "run.log", print)
    other.write("two")
    file.write("three")
    other.close()
    assert texts(tmp_path / "run.log") == ["one", "two", "three"]


def test_a_log_that_was_moved_away_is_begun_anew(tmp_path, file, complaints):
    file.write("one")
    (tmp_path / "run.log").rename(tmp_path / "run.log.1")
    file.write("two")
    (tmp_path / "run.log").rename(tmp_path / "run.log.2")
    (tmp_path / "run.log").write_text("")  # as logrotate's `create` does
    file.write("three")
    assert [texts(tmp_path / f"run.log{number}") for number in (".1", ".2", "")] == [["one"], ["two"], ["three"]]
    assert not complaints


def test_a_log_that_was_deleted_is_begun_anew(tmp_path, file, complaints):
    file.write("one")
    (tmp_path / "run.log").unlink()
    file.write("two")
    assert texts(tmp_path / "run.log") == ["two"] and not complaints


def test_a_log_that_was_emptied_goes_on_at_its_start(tmp_path, file):
    """As logrotate's `copytruncate` does."""
    file.write("one")
    os.truncate(tmp_path / "run.log", 0)
    file.write("two")
    assert texts(tmp_path / "run.log") == ["two"]


def test_where_a_log_cannot_be_begun_anew_its_lines_are_not_lost(tmp_path, file, complaints):
    file.write("one")
    (tmp_path / "run.log").rename(tmp_path / "old.log")
    (tmp_path / "run.log").mkdir()
    file.write("two")
    file.write("three")
    assert texts(tmp_path / "old.log") == ["one", "two", "three"]
    assert len(complaints) == 1 and "run.log' lacks lines: Is a directory" in complaints[0]


def test_a_rotated_log_leaks_no_descriptors(tmp_path, file):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        file.write("x")
        (tmp_path / "run.log").unlink()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_nothing_forges_a_line(tmp_path, file):
    file.write("a\n2026-11-26T07:40:12+00:00 1 ended: complete\r\x1b[2K\x85\u2028\u202e\x00")
    file.write("猫\u3000👩\u200d🚀 caf\udce9 \ud800")
    forged, harmless = texts(tmp_path / "run.log")
    escaped = r"a\n2026-11-26T07:40:12+00:00 1 ended: complete\r\x1b[2K\x85\u2028\u202e\x00"
    assert forged == escaped
    assert harmless == "猫\u3000👩\u200d🚀 caf\\udce9 \\ud800"


def test_a_line_of_ten_megabytes_keeps_its_ends(tmp_path, file):
    file.write("It begins " + "\n😀" * 3_000_000 + " and ends.")
    (line,) = texts(tmp_path / "run.log")
    assert line.startswith("It begins ") and line.endswith(" and ends.")
    assert (tmp_path / "run.log").stat().st_size < 4096


@pytest.mark.parametrize("name", ["no/such/run.log", "", ".", "pipe", "picture.png"])
def test_a_log_that_cannot_be_opened_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # that nobody reads
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(CannotCreateOutput, match="--log-file '"):
        log_file.begin(Path(name), print)
    assert Path("picture.png").stat().st_size == 16


def test_a_full_disk_is_said_once(complaints):
    file = log_file.LogFile(Path("/dev/full"), complaints.append)
    file.write("one")
    file.write("two")
    file.close()
    assert complaints == ["linfusion: --log-file '/dev/full' lacks lines: No space left on device."]


def test_a_torn_line_does_not_spoil_the_next(tmp_path, file, complaints):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file.write("one")
    size = (tmp_path / "run.log").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, limits[1]))
    try:
        file.write("two is cut off by the limit")
        file.write("three does not get there at all")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.write("four")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert len(lines) == 3 and len(complaints) == 1 and "No space left" in complaints[0]
    assert LINE.fullmatch(lines[0])[3] == "one" and LINE.fullmatch(lines[2])[3] == "four"


WRITER = """
import sys
from pathlib import Path
from linfusion_cli.cli.log import LogFile
log = LogFile(Path("run.log"), print)
for number in range(1500):
    log.write(f"{sys.argv[1]} {number} " + "x" * 900)
"""


def test_processes_that_share_a_log_which_rotates_tear_no_line_and_lose_none(tmp_path):
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [subprocess.Popen([sys.executable, "-c", WRITER, str(n)], cwd=tmp_path, env=environ) for n in range(3)]
    rotations = 0
    while any(run.poll() is None for run in runs):
        time.sleep(0.05)
        if (tmp_path / "run.log").exists() and (tmp_path / "run.log").stat().st_size:
            (tmp_path / "run.log").rename(tmp_path / f"run.log.{rotations}")
            rotations += 1
    assert all(run.returncode == 0 for run in runs) and rotations > 1
    found = sorted(text.rstrip("x ") for path in tmp_path.glob("run.log*") for text in texts(path))
    assert found == sorted(f"{run} {number}" for run in range(3) for number in range(1500))


@pytest.mark.parametrize(
    ("code", "words"),
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
def test_the_last_line_says_how_a_run_ended(tmp_path, code, words):
    log_file.begin(tmp_path / "run.log", print)
    log_file.end(code)
    log_file.write("nobody listens any more")
    begun, ended = texts(tmp_path / "run.log")
    assert begun.startswith("begun: linfusion ") and ended.startswith(f"ended: {words}, exit code {code}, after 0.")


@pytest.fixture
def small(xl_model):
    """Options of a generate that takes a second."""
    return "--model", xl_model, "--size", 64, "--steps", 1


def test_a_run_and_a_refused_one_share_a_log(cli, tmp_path, small):
    options = ("generate", "a\nhill", *small, "-o", "a\nb.png", "--quiet", "--log-file", "run.log")
    assert cli(*options) == (0, "a\nb.png\n", "")
    code, out, err = cli(*options)
    assert (code, out) == (73, "") and len(err.splitlines()) == 1
    found = texts(tmp_path / "run.log")
    ends = [text.split(",")[0] for text in found if text.startswith("ended")]
    assert ends == ["ended: complete", "ended: failed"] and found.count("output: a\\nb.png") == 2
    assert [text for text in found if text.startswith(("ready", "expected", "base 64x64: ", "complete: a\\nb.png, "))]
    assert found[-2].startswith("linfusion: ") and found[-2].endswith("or name another file.")


def test_a_log_that_cannot_be_opened_is_refused_before_any_work(cli, tmp_path, small):
    code, out, err = cli("generate", "x", *small, "-o", "a.png", "--log-file", "no/such/run.log")
    assert (code, out) == (73, "") and "--log-file 'no/such/run.log' cannot be opened: No such file" in err
    assert not list(tmp_path.iterdir())


def test_a_log_is_no_other_file_of_the_run(cli, tmp_path, small):
    code, _, err = cli("generate", "x", *small, "-o", "a.png", "--log-file", "a.png", "--overwrite")
    assert code == 2 and "--log-file 'a.png' is the file of --output" in err


def test_a_log_on_a_full_disk_does_not_end_a_run(cli, small):
    code, out, err = cli("generate", "x", *small, "-o", "a.png", "-q", "--log-file", "/dev/full")
    assert (code, out) == (0, "a.png\n") and err.count("No space left on device") == 1 == len(err.splitlines())


def test_a_bug_is_in_the_log(cli, tmp_path, monkeypatch, small):
    def fail(*arguments):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("linfusion_cli.run.pipeline.resolve_request", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli("generate", "x", *small, "-o", "a.png", "--log-file", "run.log")[0] == 70
    *_, sentence, last = texts(tmp_path / "run.log")
    assert "This is a bug in linfusion (ZeroDivisionError). Log: " in sentence
    assert last.startswith("ended: failed, exit code 70")


def start(tmp_path, *arguments, redirect="", **environ):
    """A run as a script starts it, with nothing but `environ` and what finds the program in its environment."""
    command = [sys.executable, "-m", "linfusion_cli", *map(str, arguments)]
    environ = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)} | environ
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh", *command]
    return subprocess.Popen(shell, cwd=tmp_path, env=environ, stdout=-1, stderr=-1, stdin=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_signal_is_the_last_thing_in_the_log(tmp_path, xl_model):
    options = ("--model", xl_model, "--size", 256, "--steps", 1000, "-o", "a.png", "--log-file", "run.log")
    run = start(tmp_path, "generate", "x", *options)
    while b" ready: " not in run.stderr.readline():
        assert run.poll() is None
    (tmp_path / "run.log").rename(tmp_path / "run.log.1")
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    sentence, last = texts(tmp_path / "run.log")
    assert (run.returncode, out) == (143, b"") and "Stopped by SIGTERM" in sentence
    assert last.startswith("ended: stopped by SIGTERM, exit code 143, after ")


@pytest.mark.slow
def test_a_c_locale_closed_streams_and_a_name_that_is_no_text(tmp_path, small):
    name = b"caf\xe9 \xe7\x8c\xab\n.png".decode(errors="surrogateescape")
    options = (*small, "-o", name, "--log-file", "run.log", "--json")
    run = start(tmp_path, "generate", "猫\n", *options, redirect="<&- 2>&-", LC_ALL="C")
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, b"") and json.loads(out)["output"] == name
    assert "output: caf\\udce9 猫\\n.png" in texts(tmp_path / "run.log")
    assert os.path.exists(tmp_path / name)  # noqa: PTH110 - as the bytes it is


def test_a_prompt_that_is_no_text_is_refused_in_the_log_too(cli, tmp_path, small):
    assert cli("generate", "caf\udce9\n", *small, "-o", "a.png", "--log-file", "run.log")[0] == 2
    *_, sentence, last = texts(tmp_path / "run.log")
    assert sentence.startswith("linfusion: The prompt 'caf\\udce9\\n' is not possible") and "exit code 2," in last
