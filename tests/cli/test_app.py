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
    """Options of a generate that takes a second."""
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
    assert {stage["kind"] for stage in report["stages"]} == {"load", "hash", "text", "denoise", "decode", "write"}


def valid_json(text: str) -> dict:
    """JSON as other programs read it: Python's own would take Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_guidance_without_an_upper_limit_is_valid_json_everywhere(cli, quick, tmp_path):
    upper = ("--guidance-interval", "0.28,inf")
    paths = ("-o", "a.png", "--report", "r.json", "--keep-latents", "a.safetensors")
    planned = cli("plan", *quick[1:], *upper, "--json")
    made = cli(*quick, *upper, *paths, "--json")
    decoded = cli("decode", "a.safetensors", "-o", "b.tif", "--json")
    assert [code for code, *_ in (planned, made, decoded)] == [0, 0, 0]
    texts = [planned[1], made[1], (tmp_path / "r.json").read_text(), decoded[1]]
    texts += [cli("info", name, "--json")[1] for name in ("a.png", "b.tif")]
    assert [valid_json(text)["request"]["guidance_interval"] for text in texts] == [[0.28, "inf"]] * 6
    (tmp_path / "mine.toml").write_text("guidance_interval = [0.28, inf]\n")
    preset = cli("plan", *quick[1:], "--preset", "mine.toml", "--json")[1]
    assert valid_json(preset)["request"] == valid_json(planned[1])["request"]


def test_quiet_is_quiet(cli, quick):
    assert cli(*quick, "-o", "a.png", "--quiet") == (0, "a.png\n", "")


def test_without_an_output_the_name_tells_size_and_seed(cli, quick, tmp_path):
    code, out, _ = cli(*quick, "--seed", 7, "--format", "jpeg")
    assert (code, out) == (0, "linfusion-64x64-seed7.jpg\n")


def test_prompt_from_stdin(cli, quick, tmp_path, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("from [stdin] 😀\n".encode()), encoding="ascii"))
    quick[1] = "-"
    assert cli(*quick, "-o", "a.png")[0] == 0
    assert read_info(tmp_path / "a.png").request["prompt"] == "from [stdin] 😀"


def test_with_nothing_named_the_demo_stands_in_and_says_so(cli, tmp_path):
    code, _, err = cli("generate", "--size", 64, "--steps", 1, "-o", "a.png")
    assert code == 0 and err.count("embedded demo model") == 1
    assert read_info(tmp_path / "a.png").request["model"] == "demo"


def test_with_nothing_named_sdxl_runs_if_it_is_here(cli, xl_model, monkeypatch, tmp_path):
    preset = tmp_path / "presets"
    preset.mkdir()
    for name in ("sdxl", "demo"):
        (preset / f"{name}.toml").write_text(f"model = '{xl_model}'\nprompt = '{name}'\nsteps = 1\n")
    monkeypatch.setattr("linfusion_cli.settings.presets.PRESET_FOLDER", preset)
    code, _, err = cli("generate", "--size", 64, "-o", "a.png")
    assert code == 0 and "embedded" not in err
    assert read_info(tmp_path / "a.png").request["prompt"] == "sdxl"


def test_a_named_preset_is_never_replaced(cli, tmp_path):
    for name in ("sdxl", "sd21", "sd15"):
        code, out, err = cli("generate", "--preset", name, "--size", 64, "-o", "a.png")
        assert (code, out) == (69, "") and "not on this machine" in err and "--download" in err
    assert not list(tmp_path.glob("a*"))


def test_presets_from_environment_and_config(cli, tmp_path, monkeypatch, xl_model):
    config = tmp_path / "config" / "linfusion" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f"preset = 'mine.toml'\nmodel = '{xl_model}'\nsteps = 1")
    (tmp_path / "mine.toml").write_text("prompt = 'mine'\nsteps = 2\nsize = 64")
    code, out, _ = cli("generate", "-o", "a.png", "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["request"]["prompt"], report["request"]["steps"]) == ("mine", [1])
    assert report["settings"]["prompt"] == "preset mine.toml" and str(config) in report["settings"]["steps"]
    monkeypatch.setenv("LINFUSION_PRESET", "nope")
    assert cli("generate", "-o", "b.png")[0] == 2


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--size", "0"], 2, "'0' is too small"),
        (["--size", "abc"], 2, "'abc' is not a size"),
        (["--size", "64", "--preset", "nope"], 2, "no preset 'nope'"),
        (["--size", "64", "--preset", "nope.toml"], 66, "nope.toml is missing"),
        (["--size", "64", "--model", "nobody/nothing"], 69, "nobody/nothing is not on this machine"),
        (["--size", "64", "--model", "./nowhere"], 69, "no such folder"),
        (["--size", "64", "--device", "cuda"], 69, "--device cuda is not on this machine"),
        (["--size", "64", "--device", "tpu"], 2, "'tpu' is unknown"),
        (["--size", "64", "--dtype", "float16", "--device", "cpu"], 2, "--dtype float16 needs a GPU"),
        (["--size", "64", "--steps", "0"], 2, "--steps 0"),
        (["--size", "64", "-o", "no/such/a.png"], 73, "no/such"),
        (["--size", "64", "-o", "a.gif"], 2, "a.gif"),
        (["--size", "64", "--report", "no/such/r.json"], 73, "no/such"),
        (["--size", "64", "--preview", "no/such/p.jpg"], 73, "no/such"),
        (["--size", "64", "--linfusion", "nobody/nothing"], 69, "--linfusion nobody/nothing"),
        ([], 2, "No size was given. Add --size"),
        (["--size", ""], 2, "'' is not a size"),
        (["--size", "64", "--preset", ""], 2, "no preset ''"),
        (["--size", "64", "--preview", "./a.png"], 2, "--preview 'a.png' is the file of --output"),
        (["--size", "64", "--report", "a.png"], 2, "--report 'a.png' is the file of --output"),
        (["", "--size", "64"], 2, "prompt is empty"),
    ],
)
def test_what_a_person_gets_wrong_is_one_sentence_and_leaves_nothing(cli, tmp_path, options, code, says):
    found, out, err = (
        cli("generate", "--model", "demo", "a hill", "-o", "a.png", *options)
        if "" not in options
        else cli("generate", *options)
    )
    lines = [line for line in err.splitlines() if " linfusion: " in line]
    assert (found, out) == (code, "") and len(lines) == 1 and says in lines[0]
    assert "Traceback" not in err and not [path for path in tmp_path.iterdir() if path.is_file()]


def test_a_wrong_flag_is_usage(cli):
    code, out, err = cli("generate", "--sizes", 64)
    assert (code, out) == (2, "") and "--sizes" in err


def test_a_model_alone_needs_a_prompt(cli, xl_model):
    code, _, err = cli("generate", "--model", xl_model, "--size", 64)
    assert code == 2 and "No prompt was given. Write it as the argument" in err


def test_a_bug_is_one_line_and_a_log(cli, quick, monkeypatch):
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
def test_what_torch_says_of_a_gpu_outside_of_a_run_has_its_code(cli, quick, monkeypatch, text, code):
    def fail(*arguments):
        raise RuntimeError(f"{text}\nCUDA kernel errors might be reported elsewhere.")

    monkeypatch.setattr("linfusion_cli.run.stages.plan.plan_run", fail)
    found, out, err = cli("plan", *quick[1:])
    assert (found, out) == (code, "") and len(err.splitlines()) == 1
    assert code == 70 or text in err
    if code == 70:
        Path(re.search(r"Log: (\S+)", err)[1]).unlink()


def test_info_reads_back_the_request(cli, quick, tmp_path):
    quick[1] = "a [cat] 😀"
    cli(*quick, "-o", "a.tif")
    code, out, _ = cli("info", "a.tif")
    assert code == 0 and "size: 64x64" in out and "prompt: a [cat] 😀" in out and "tiles of 64x64" in out
    assert json.loads(cli("info", "a.tif", "--json")[1])["request"]["prompt"] == "a [cat] 😀"


def test_info_refuses_what_is_no_whole_image(cli, quick, tmp_path):
    cli(*quick, "-o", "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:-20])
    (tmp_path / "c.png").write_text("hello")
    assert [cli("info", name)[0] for name in ("a.png", "b.png", "c.png", "d.png")] == [0, 65, 65, 66]


PRESETS = ["demo", "sd15", "sd21", "sdxl", "sdxl-hyper", "sdxl-lcm", "sdxl-lightning"]


def test_presets_list_and_show(cli):
    code, out, _ = cli("presets", "list")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == PRESETS
    assert "steps = 24" in cli("presets", "show", "demo")[1]
    assert cli("presets", "show", "nope")[0] == 2


def test_doctor_tells_what_is_here(cli):
    code, out, _ = cli("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["model demo"] == "demo, here" and "not on this machine" in found["model sdxl"]
    assert {"torch", "cuda", "memory limit", "codec imagecodecs"} <= set(found)
    assert "cpus: " in cli("doctor")[1]


def test_version(cli):
    assert cli("--version")[:2] == (0, "linfusion 0.1.0\n")


def start(tmp_path: Path, *arguments: object, **more: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "linfusion_cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, **{"text": True} | more)


@pytest.mark.parametrize("bytes_in", [b"caf\xe9", b"", b" \n"])
def test_a_prompt_on_stdin_that_is_none(tmp_path, xl_model, bytes_in):
    run = start(tmp_path, "generate", "-", "--model", xl_model, "--size", 64, stdin=subprocess.PIPE, text=False)
    _, err = run.communicate(bytes_in, timeout=60)
    assert run.returncode == 2 and b"prompt" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "code"), mostly_slow(STOPS, quick=[(signal.SIGTERM, 143), (signal.SIGUSR1, 138)]))
def test_a_signal_ends_a_run_with_its_code_its_state_and_no_file(tmp_path, xl_model, number, code):
    arguments = ["--size", 256, "--steps", 1000, "--checkpoint-every", 0, "-o", "a.png"]
    run = start(tmp_path, "generate", "x", "--model", xl_model, *arguments)
    while not (tmp_path / "a.png.linfusion" / "journal.json").exists():  # in the base, which takes far longer
        assert run.poll() is None
        time.sleep(0.01)
    for _ in range(3):  # as an impatient person, or `timeout`, which signals the group as well
        run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (code, "") and "Traceback" not in err
    assert re.search(
        rf"Stopped by {number.name}\. Saved: step \d+ of 1000 in phase base; the same command goes on", err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.png.linfusion"]


@pytest.mark.slow
@pytest.mark.parametrize("after_sec", [0.1, 0.8, 1.6, 2.4, 3.2])
def test_a_signal_while_libraries_are_imported_is_a_signal(tmp_path, xl_model, after_sec):
    """They catch every Exception that passes, and a run that was to stop would call itself a bug."""
    run = start(tmp_path, "generate", "x", "--model", xl_model, "--size", 256, "--steps", 1000, "-o", "a.png")
    while not list(tmp_path.glob(".a.png*")):
        assert run.poll() is None
    time.sleep(after_sec)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 143 and "Stopped by SIGTERM" in err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_empty_environment_and_a_c_locale_do(tmp_path, xl_model):
    arguments = ["generate", "猫 [cat] 😀", "--model", xl_model, "--size", 64, "--steps", 1, "-o", "a.png"]
    run = start(tmp_path, *arguments, env={"LC_ALL": "POSIX", "PATH": os.defpath}, stdin=subprocess.DEVNULL)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, out) == (0, "a.png\n"), err
    assert read_info(tmp_path / "a.png").request["prompt"] == "猫 [cat] 😀"
    assert "Warning" not in err and "warn" not in err


@pytest.mark.slow
def test_closed_streams_do_not_end_a_run(tmp_path, xl_model):
    """As `>&- 2>&-` in a script leaves them."""
    command = f'"{sys.executable}" -m linfusion_cli generate x --model "{xl_model}" --size 64 --steps 1 -o a.png'
    done = subprocess.run(["sh", "-c", f"{command} >&- 2>&-"], cwd=tmp_path, check=False)
    assert done.returncode == 0 and read_info(tmp_path / "a.png").width_px == 64


@pytest.mark.slow
@pytest.mark.parametrize(("redirect", "code"), [(">/dev/full", 74), ("2>/dev/full", 0), ("2> >(true)", 0)])
def test_streams_that_refuse_do_not_take_the_image_with_them(tmp_path, xl_model, redirect, code):
    command = f'"{sys.executable}" -m linfusion_cli generate x --model "{xl_model}" --size 64 --steps 1 -o a.png'
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as in cron
    command = ["bash", "-c", f"{command} {redirect}"]
    done = subprocess.run(command, cwd=tmp_path, env=buffered, capture_output=True, text=True, check=False)
    assert done.returncode == code and "bug" not in done.stderr and read_info(tmp_path / "a.png").width_px == 64


@pytest.mark.slow
def test_a_name_that_is_no_text_is_printed_as_the_bytes_it_is(tmp_path, xl_model):
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
    assert code == 70 and "bug in linfusion: oops (ZeroDivisionError)" in err and "Traceback" not in err


def test_a_reader_that_leaves_early_is_no_bug(tmp_path):
    run = start(tmp_path, "presets", "show", "sdxl")
    run.stdout.close()
    assert (run.wait(timeout=60), run.stderr.read()) == (0, "")
