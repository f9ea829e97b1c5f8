"""The program: streams, exit codes, error messages, signals, and the commands generate, info, presets and doctor."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linfusion_cli.images import read_info
from tests.core.test_signals import STOPS
from tests.support.marks import mostly_slow


@pytest.fixture
def quick(xl_model):
    """Arguments of a run that takes a second."""
    return ["generate", "a hill", "--model", xl_model, "--size", 64, "--steps", 1]


def test_generate_prints_the_path_alone_on_stdout(cli, quick, tmp_path):
    code, out, err = cli(*quick, "-o", "a.png")
    assert (code, out) == (0, "a.png\n")
    assert "base 64x64" in err and " complete: a.png, " in err.splitlines()[-1]
    assert read_info(tmp_path / "a.png").width_px == 64


def test_json_on_stdout_is_the_report_and_the_report_file_the_same(cli, quick, tmp_path):
    code, out, err = cli(*quick, "-o", "a.png", "--json", "--report", "r.json")
    assert code == 0
    report = json.loads(out)
    assert report == json.loads((tmp_path / "r.json").read_text())
    assert report["settings"]["steps"] == "flag" and report["settings"]["seed"] == "default"
    assert report["request"]["prompt"] == "a hill" and report["file_bytes"] > 0
    kinds = {"resolve", "plan", "load", "encode_prompts", "denoise", "decode", "write"}
    assert {stage["kind"] for stage in report["stages"]} == kinds


def parse_strict_json(text: str) -> dict:
    """Parse JSON, but reject Infinity and NaN, which Python accepts and other programs do not."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not valid JSON"))


def test_guidance_without_an_upper_limit_is_valid_json_everywhere(cli, quick, tmp_path):
    upper = ("--guidance-interval", "0.28,inf")
    paths = ("-o", "a.png", "--report", "r.json", "--keep-latents", "a.safetensors")
    planned = cli("plan", *quick[1:], *upper, "--json")
    made = cli(*quick, *upper, *paths, "--json")
    decoded = cli("decode", "a.safetensors", "-o", "b.tif", "--json")
    assert [code for code, *_ in (planned, made, decoded)] == [0, 0, 0]
    texts = [planned[1], made[1], (tmp_path / "r.json").read_text(), decoded[1]]
    texts += [cli("info", name, "--json")[1] for name in ("a.png", "b.tif")]
    assert [parse_strict_json(text)["request"]["guidance_interval"] for text in texts] == [[0.28, "inf"]] * 6
    (tmp_path / "mine.toml").write_text("guidance_interval = [0.28, inf]\n")
    preset = cli("plan", *quick[1:], "--preset", "mine.toml", "--json")[1]
    assert parse_strict_json(preset)["request"] == parse_strict_json(planned[1])["request"]


def test_quiet_prints_nothing_on_stderr(cli, quick):
    assert cli(*quick, "-o", "a.png", "--quiet") == (0, "a.png\n", "")


def test_the_default_output_is_named_after_size_and_seed(cli, quick, tmp_path):
    code, out, _ = cli(*quick, "--seed", 7, "--format", "jpeg")
    assert (code, out) == (0, "linfusion-64x64-seed7.jpg\n")


def test_prompt_from_stdin(cli, quick, tmp_path, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("from [stdin] 😀\n".encode()), encoding="ascii"))
    quick[1] = "-"
    assert cli(*quick, "-o", "a.png")[0] == 0
    assert read_info(tmp_path / "a.png").request["prompt"] == "from [stdin] 😀"


def test_the_demo_model_is_the_default_without_sdxl_and_a_notice_says_so(cli, tmp_path):
    code, _, err = cli("generate", "--size", 64, "--steps", 1, "-o", "a.png")
    assert code == 0 and err.count("embedded demo model") == 1
    assert read_info(tmp_path / "a.png").request["model"] == "demo"


def test_sdxl_is_the_default_if_it_is_installed(cli, xl_model, monkeypatch, tmp_path):
    preset = tmp_path / "presets"
    preset.mkdir()
    for name in ("sdxl", "demo"):
        (preset / f"{name}.toml").write_text(f"model = '{xl_model}'\nprompt = '{name}'\nsteps = 1\n")
    monkeypatch.setenv("LINFUSION_PRESET_PATH", str(preset))
    code, _, err = cli("generate", "--size", 64, "-o", "a.png")
    assert code == 0 and "embedded" not in err
    assert read_info(tmp_path / "a.png").request["prompt"] == "sdxl"


def test_a_named_preset_is_never_replaced(cli, tmp_path):
    for name in ("sdxl", "sd21", "sd15"):
        code, out, err = cli("generate", "--preset", name, "--size", 64, "-o", "a.png")
        assert (code, out) == (69, "") and "--download" in err
    assert not list(tmp_path.glob("a*"))


def test_presets_from_environment_and_config(cli, tmp_path, monkeypatch, xl_model):
    config = tmp_path / "config" / "linfusion" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f"preset = 'mine.toml'\nmodel = '{xl_model}'\nsteps = 1")
    preset = config.with_name("mine.toml")  # relative to the config file
    preset.write_text("prompt = 'mine'\nsteps = 2\nsize = 64")
    code, out, _ = cli("generate", "-o", "a.png", "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["request"]["prompt"], report["request"]["steps"]) == ("mine", [1])
    assert report["settings"]["prompt"] == f"preset {preset}" and str(config) in report["settings"]["steps"]
    monkeypatch.setenv("LINFUSION_PRESET", "nope")
    assert cli("generate", "-o", "b.png")[0] == 2


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--size", "0"], 2, "--size '0'"),
        (["--size", "abc"], 2, "--size 'abc'"),
        (["--size", "64", "--preset", "nope"], 2, "preset 'nope'"),
        (["--size", "64", "--preset", "nope.toml"], 66, "nope.toml"),
        (["--size", "64", "--model", "nobody/nothing"], 69, "nobody/nothing"),
        (["--size", "64", "--model", "./nowhere"], 69, "./nowhere"),
        (["--size", "64", "--device", "cuda"], 69, "--device cuda"),
        (["--size", "64", "--device", "tpu"], 2, "'tpu'"),
        (["--size", "64", "--dtype", "float16", "--device", "cpu"], 2, "--dtype float16"),
        (["--size", "64", "--steps", "0"], 2, "--steps 0"),
        (["--size", "64", "-o", "no/such/a.png"], 73, "no/such"),
        (["--size", "64", "-o", "a.gif"], 2, "a.gif"),
        (["--size", "64", "--report", "no/such/r.json"], 73, "no/such"),
        (["--size", "64", "--preview", "no/such/p.jpg"], 73, "no/such"),
        (["--size", "64", "--linfusion", "nobody/nothing"], 69, "--linfusion nobody/nothing"),
        ([], 2, "--size"),
        (["--steps", "0"], 2, "--steps 0"),
        (["--size", ""], 2, "--size ''"),
        (["--size", "64", "--preset", ""], 2, "preset ''"),
        (["--size", "64", "--preview", "./a.png"], 2, "--preview 'a.png'"),
        (["--size", "64", "--report", "a.png"], 2, "--report 'a.png'"),
        (["", "--size", "64"], 2, "prompt"),
    ],
)
def test_an_invalid_option_is_one_line_and_leaves_no_file(cli, tmp_path, options, code, text):
    exit_code, out, err = (
        cli("generate", "--model", "demo", "a hill", "-o", "a.png", *options)
        if "" not in options
        else cli("generate", *options)
    )
    lines = [line for line in err.splitlines() if " linfusion: " in line]
    assert (exit_code, out) == (code, "") and len(lines) == 1 and text in lines[0]
    assert "Traceback" not in err and not [path for path in tmp_path.iterdir() if path.is_file()]


def test_an_unknown_flag_is_a_usage_error(cli):
    code, out, err = cli("generate", "--sizes", 64)
    assert (code, out) == (2, "") and "--sizes" in err


def test_a_model_alone_needs_a_prompt(cli, xl_model):
    code, _, err = cli("generate", "--model", xl_model, "--size", 64)
    assert code == 2 and "prompt" in err


def test_a_bug_is_one_line_and_a_log_with_the_traceback(cli, quick, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("linfusion_cli.run.pipeline.resolve_request", fail)
    code, out, err = cli(*quick)
    assert (code, out) == (70, "") and len(err.splitlines()) == 1
    log = Path(re.search(r"Log: (\S+)", err)[1])
    assert "ZeroDivisionError: oops" in log.read_text()
    log.unlink()


def test_out_of_memory_is_71(cli, quick, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("linfusion_cli.run.pipeline.resolve_request", fail)
    assert cli(*quick)[0] == 71


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", 69),
        ("CUDA error: unknown error", 69),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", 71),
        ("CUDA error: an illegal memory access was encountered", 70),
    ],
)
def test_errors_of_torch_outside_a_run_have_their_exit_code(cli, quick, monkeypatch, text, code):
    def fail(*arguments):
        raise RuntimeError(f"{text}\nCUDA kernel errors might be reported elsewhere.")

    monkeypatch.setattr("linfusion_cli.run.stages.plan.plan_on_machine", fail)
    exit_code, out, err = cli("plan", *quick[1:])
    assert (exit_code, out) == (code, "") and len(err.splitlines()) == 1
    assert code == 70 or text in err
    if code == 70:
        Path(re.search(r"Log: (\S+)", err)[1]).unlink()


def test_info_reads_back_the_request(cli, quick, tmp_path):
    quick[1] = "a [cat] 😀"
    cli(*quick, "-o", "a.tif")
    code, out, _ = cli("info", "a.tif")
    assert code == 0 and "size: 64x64" in out and "prompt: a [cat] 😀" in out and "tiles of 64x64" in out
    assert json.loads(cli("info", "a.tif", "--json")[1])["request"]["prompt"] == "a [cat] 😀"


def test_info_rejects_damaged_files(cli, quick, tmp_path):
    cli(*quick, "-o", "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[:-20])
    (tmp_path / "c.png").write_text("hello")
    assert [cli("info", name)[0] for name in ("a.png", "b.png", "c.png", "d.png")] == [0, 65, 65, 66]


PRESETS = ["demo", "sd15", "sd21", "sdxl", "sdxl-hyper", "sdxl-lcm", "sdxl-lightning"]


def test_presets_list_and_show(cli):
    code, out, _ = cli("presets", "list")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == PRESETS
    assert "steps = 24" in cli("presets", "show", "demo")[1]
    assert cli("presets", "show", "nope")[0] == 2


def test_doctor_lists_versions_memory_and_models(cli):
    code, out, _ = cli("doctor", "--json")
    values = json.loads(out)
    assert code == 0 and values["model demo"] == "demo, installed" and "not installed" in values["model sdxl"]
    assert {"torch", "cuda", "memory limit", "codec imagecodecs"} <= set(values)
    assert "cpus: " in cli("doctor")[1]


def test_version(cli):
    assert cli("--version")[:2] == (0, "linfusion 0.1.0\n")


def start(tmp_path: Path, *arguments: object, **more: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "linfusion_cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, **{"text": True} | more)


@pytest.mark.parametrize("bytes_in", [b"caf\xe9", b"", b" \n"])
def test_an_empty_or_undecodable_prompt_on_stdin_is_a_usage_error(tmp_path, xl_model, bytes_in):
    run = start(tmp_path, "generate", "-", "--model", xl_model, "--size", 64, stdin=subprocess.PIPE, text=False)
    _, err = run.communicate(bytes_in, timeout=60)
    assert run.returncode == 2 and b"prompt" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code"), mostly_slow(STOPS, quick=[(signal.SIGTERM, 143), (signal.SIGUSR1, 138)]))
def test_a_signal_ends_a_run_with_its_code_its_state_and_no_file(tmp_path, xl_model, number, code):
    arguments = ["--size", 256, "--steps", 1000, "--checkpoint-every", 0, "-o", "a.png"]
    run = start(tmp_path, "generate", "x", "--model", xl_model, *arguments)
    while not (tmp_path / "a.png.linfusion" / "checkpoint.json").exists():  # in the base phase, which takes much longer
        assert run.poll() is None
        time.sleep(0.01)
    for _ in range(3):  # like an impatient user, or `timeout`, which also signals the process group
        run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (code, "") and "Traceback" not in err
    assert re.search(rf"Stopped by {number.name}\..* step \d+ of 1000 in phase base", err)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png.linfusion"]


@pytest.mark.slow
@pytest.mark.parametrize("after_sec", [0.1, 0.8, 1.6, 2.4, 3.2])
def test_a_signal_during_the_import_of_libraries_stops_the_run(tmp_path, xl_model, after_sec):
    """Libraries catch every Exception during imports; the run must not report their error as a bug."""
    run = start(tmp_path, "generate", "x", "--model", xl_model, "--size", 256, "--steps", 1000, "-o", "a.png")
    while not list(tmp_path.glob(".a.png*")):
        assert run.poll() is None
    time.sleep(after_sec)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 143 and "Stopped by SIGTERM" in err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_works_with_an_empty_environment_and_a_c_locale(tmp_path, xl_model):
    arguments = ["generate", "猫 [cat] 😀", "--model", xl_model, "--size", 64, "--steps", 1, "-o", "a.png"]
    run = start(tmp_path, *arguments, env={"LC_ALL": "POSIX", "PATH": os.defpath}, stdin=subprocess.DEVNULL)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, out) == (0, "a.png\n"), err
    assert read_info(tmp_path / "a.png").request["prompt"] == "猫 [cat] 😀"
    assert "Warning" not in err and "warn" not in err


@pytest.mark.slow
def test_closed_streams_do_not_end_a_run(tmp_path, xl_model):
    """A script can close them with `>&- 2>&-`."""
    command = f'"{sys.executable}" -m linfusion_cli generate x --model "{xl_model}" --size 64 --steps 1 -o a.png'
    done = subprocess.run(["sh", "-c", f"{command} >&- 2>&-"], cwd=tmp_path, check=False)
    assert done.returncode == 0 and read_info(tmp_path / "a.png").width_px == 64


@pytest.mark.slow
@pytest.mark.parametrize(("redirect", "code"), [(">/dev/full", 74), ("2>/dev/full", 0), ("2> >(true)", 0)])
def test_a_stream_that_cannot_be_written_does_not_lose_the_image(tmp_path, xl_model, redirect, code):
    command = f'"{sys.executable}" -m linfusion_cli generate x --model "{xl_model}" --size 64 --steps 1 -o a.png'
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as in cron
    command = ["bash", "-c", f"{command} {redirect}"]
    done = subprocess.run(command, cwd=tmp_path, env=buffered, capture_output=True, text=True, check=False)
    assert done.returncode == code and "bug" not in done.stderr and read_info(tmp_path / "a.png").width_px == 64


@pytest.mark.slow
def test_a_file_name_that_is_not_utf8_is_printed_unchanged(tmp_path, xl_model):
    command = [sys.executable, "-m", "linfusion_cli", "generate", "x", "--model", str(xl_model), "--size", "64"]
    done = subprocess.run(
        [*command, "--steps", "1", "-o", b"caf\xe9.png"], cwd=tmp_path, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"caf\xe9.png\n")


def test_a_bug_where_no_log_can_be_written_is_still_one_line(cli, quick, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("oops\nand more")

    monkeypatch.setattr("linfusion_cli.run.pipeline.resolve_request", fail)
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    code, _, err = cli(*quick)
    assert code == 70 and "oops (ZeroDivisionError)" in err and "Traceback" not in err


def test_a_reader_that_exits_early_is_not_an_error(tmp_path):
    run = start(tmp_path, "presets", "show", "sdxl")
    run.stdout.close()
    assert (run.wait(timeout=60), run.stderr.read()) == (0, "")
