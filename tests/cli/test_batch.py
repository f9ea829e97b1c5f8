"""`linfusion batch` on the command line."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from linfusion_cli.images import read_info


@pytest.fixture
def quick(xl_model):
    """Options of jobs that take a moment."""
    return ["--output-dir", "out", "--model", xl_model, "--size", 64, "--steps", 1, "--format", "png"]


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_list_makes_its_images_and_the_same_command_skips_them(cli, quick, tmp_path):
    write(
        tmp_path / "jobs.jsonl",
        {"prompt": "a hill"},
        "{",
        {"prompt": "a sea", "seed": 5, "size": "128x64"},
        {"output": "b"},
    )
    code, out, err = cli("batch", "jobs.jsonl", *quick)
    assert (code, out) == (3, "out/0001-a-hill-0.png\nout/0003-a-sea-5.png\n")
    assert "job 3 of 4: 0001-a-hill-0.png" in err and "batch: 2 done, 2 failed" in err
    assert "  jobs.jsonl:2: " in err and re.search(r"  jobs\.jsonl:4: .*prompt", err)
    info = read_info(tmp_path / "out/0003-a-sea-5.png")
    assert (info.width_px, info.height_px, info.request["seed"], info.request["steps"]) == (128, 64, 5, [1])
    code, out, err = cli("batch", "jobs.jsonl", *quick, "--json", "-q")
    summary = json.loads(out)
    assert code == 3 and (summary["skipped"], summary["done"], summary["failed"]) == (2, 0, 2)
    assert [failure["line"] for failure in summary["failures"]] == [2, 4] and "base" not in err
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["failed"] * 2 + ["done"] * 2 + ["failed"] * 2 + ["skipped"] * 2


def test_a_dry_run_lists_jobs_and_generates_nothing(cli, quick, tmp_path, monkeypatch):
    write(tmp_path / "jobs.txt", "a hill", "a sea", "", "# a comment")
    assert cli("batch", "jobs.txt", *quick, "--name", "{slug}")[0] == 0
    (tmp_path / "out/a-sea.png").unlink()
    before = (tmp_path / "out/results.jsonl").read_bytes()
    monkeypatch.setattr("linfusion_cli.batch.runner.run_pipeline", None)
    code, out, _ = cli("batch", "jobs.txt", *quick, "--name", "{slug}", "--dry-run")
    assert (code, out) == (0, "skipped\tout/a-hill.png\nplanned\tout/a-sea.png\n")
    code, out, _ = cli("batch", "jobs.txt", *quick, "--name", "{slug}", "--dry-run", "--json")
    assert [job["status"] for job in json.loads(out)["outputs"]] == ["skipped", "planned"]
    code, out, err = cli("batch", "jobs.txt", *quick, "--name", "{slug}", "--dry-run", "--dpi", 72)
    assert code == 3 and "out/a-hill.png exists" in err
    assert (tmp_path / "out/results.jsonl").read_bytes() == before


def test_settings_of_a_job_override_flags_environment_and_preset(cli, quick, tmp_path, monkeypatch):
    monkeypatch.setenv("LINFUSION_NEGATIVE_PROMPT", "fog")
    monkeypatch.setenv("LINFUSION_SEED", "7")
    write(tmp_path / "jobs.csv", "prompt,steps,negative_prompt,preset", "a hill,2,,", "a sea,,rain,demo")
    assert cli("batch", "jobs.csv", *quick, "--reports")[0] == 0
    one, other = (
        json.loads((tmp_path / f"out/{name}-7.png.json").read_text()) for name in ("0001-a-hill", "0002-a-sea")
    )
    assert (one["request"]["steps"], one["request"]["negative_prompt"], one["request"]["guidance_scale"]) == (
        [2],
        "fog",
        [5.0],
    )
    assert (other["request"]["steps"], other["request"]["negative_prompt"], other["request"]["guidance_scale"]) == (
        [1],
        "rain",
        [4.0],
    )
    assert {one["settings"][name] for name in ("steps", "prompt")} == {"job"} and one["settings"]["size"] == "flag"
    assert one["settings"]["seed"] == "LINFUSION_SEED" and other["settings"]["guidance_scale"] == "preset demo"


def test_a_batch_can_upscale_images(cli, quick, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    write(
        tmp_path / "jobs.toml", "[[job]]", "image = 'p.png'", "size = 128", "[[job]]", "image = 'no.png'", "size = 128"
    )
    code, out, err = cli("batch", "jobs.toml", *quick)
    assert (code, out) == (3, "out/0001-picture-0.png\n") and "jobs.toml:4: no.png does not exist" in err
    assert cli("batch", "jobs.toml", *quick, "-q")[1] == out
    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    assert "out/0001-picture-0.png exists" in cli("batch", "jobs.toml", *quick)[2]


def test_standard_input_seeds_and_shards(cli, quick, tmp_path, monkeypatch):
    made = []
    for number in (1, 2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a hill"}\n')))
        code, out, err = cli("batch", "-", *quick, "--seeds", "1-3", "--shard", f"{number}/2", "-q")
        assert (code, err) == (0, "")
        made += out.splitlines()
    assert sorted(made) == [f"out/0001-a-hill-{seed}.png" for seed in (1, 2, 3)]
    assert {path.name for path in (tmp_path / "out").glob("*.jsonl")} == {
        "results-1-of-2.jsonl",
        "results-2-of-2.jsonl",
    }


@pytest.mark.parametrize(
    ("options", "code", "pattern"),
    [
        ([], 2, "--watch"),
        (["jobs.txt", "--watch", "."], 2, "--watch"),
        (["--watch", ".", "--dry-run"], 2, "--watch and --dry-run"),
        (["--watch", "nowhere"], 66, "nowhere"),
        (["nowhere.jsonl"], 66, "nowhere.jsonl"),
        (["."], 65, "folder"),
        (["jobs.txt", "--seeds", "x"], 2, "--seeds 'x'"),
        (["jobs.txt", "--seeds", "1", "--seed", "1"], 2, "--seed and --seeds"),
        (["jobs.txt", "--shard", "3/2"], 2, "--shard '3/2'"),
        (["jobs.txt", "--name", "{prompt}"], 2, "'prompt'"),
        (["jobs.txt", "--preset", "nope"], 2, "preset 'nope'"),
        (["jobs.txt", "--size", "x"], 2, "--size 'x'"),
        (["jobs.txt", "--output", "a.png"], 2, "--output"),
        (["wrong.csv"], 65, "line 1.*'promt'"),
        (["jobs.json"], 65, r"jobs\.json .*'\.json'.*\.jsonl"),
        (["array.jsonl"], 65, r"array\.jsonl .*JSON array \(line 1: '\[{"),
        (["array.jsonl", "--dry-run"], 65, "JSONL, one object per line"),
        (["nul.txt"], 65, r"nul\.txt .*NUL.* line 3"),
        (["nul.txt", "--dry-run", "-q"], 65, r"nul\.txt .*NUL.* line 3"),
        (["comments.txt"], 65, r"comments\.txt .*no jobs"),
        (["comments.txt", "--shard", "2/2", "--seeds", "1-3"], 65, r"comments\.txt .*no jobs"),
        (["/dev/null"], 65, "/dev/null .*no jobs"),
        (["jobs.txt", "--output-dir", "jobs.txt"], 73, "jobs.txt"),
    ],
)
def test_an_invalid_option_or_list_is_one_line(cli, quick, tmp_path, options, code, pattern):
    write(tmp_path / "jobs.txt", "a hill")
    write(tmp_path / "wrong.csv", "promt", "a hill")
    write(tmp_path / "jobs.json", {"prompt": "a hill"})
    write(tmp_path / "array.jsonl", [{"prompt": "a hill"}])
    write(tmp_path / "nul.txt", "a hill", "a sea", "a\0b")
    write(tmp_path / "comments.txt", "# a hill", "")
    exit_code, out, err = cli("batch", *quick, *options)
    assert (exit_code, out) == (code, "") and re.search(pattern, err) and "Traceback" not in err
    assert not list(tmp_path.glob("out/*.png"))


def test_a_bug_is_logged_and_the_next_job_runs(cli, quick, tmp_path, monkeypatch):
    from linfusion_cli.run import pipeline

    real = pipeline.resolve_request

    def fail(request, image):
        if request.seed == 1:
            raise ZeroDivisionError("oops")
        return real(request, image)

    monkeypatch.setattr(pipeline, "resolve_request", fail)
    write(tmp_path / "jobs.jsonl", {"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 2})
    code, out, err = cli("batch", "jobs.jsonl", *quick)
    assert (code, out) == (3, "out/0002-b-2.png\n") and "(ZeroDivisionError). Log: " in err
    log = Path(err.split("Log: ")[1].split()[0])
    assert "ZeroDivisionError: oops" in log.read_text()
    log.unlink()


def start(tmp_path: Path, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "linfusion_cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True, env=environment)


@pytest.mark.slow
def test_a_signal_ends_a_batch_with_its_code_and_keeps_the_results(tmp_path, quick):
    write(tmp_path / "jobs.jsonl", {"prompt": "a"}, {"prompt": "b", "steps": 1000, "size": 512}, {"prompt": "c"})
    run = start(tmp_path, "batch", "jobs.jsonl", *quick)
    while "job 2 of 3" not in run.stderr.readline():
        assert run.poll() is None
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert (
        (run.returncode, out) == (143, "out/0001-a-0.png\n") and "batch: 1 done" in err and "Stopped by SIGTERM" in err
    )
    lines = (tmp_path / "out/results.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [1]


def test_a_watched_folder_runs_lists_until_a_signal(tmp_path, quick):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/one.txt", "a hill")
    (tmp_path / "in/two.csv").write_bytes(b"promt\n\xff\n")
    write(tmp_path / "in/notes.md", "a sea")
    write(tmp_path / "in/array.jsonl", [{"prompt": "a hill"}])
    (tmp_path / "in/empty.txt").touch()
    run = start(tmp_path, "batch", "--watch", "in", *quick, "--log-file", "log")
    assert run.stdout.readline() == "out/0001-a-hill-0.png\n"
    write(tmp_path / "in/.three", "a sea").rename(tmp_path / "in/three.txt")
    assert run.stdout.readline() == "out/0001-a-sea-0.png\n"
    time.sleep(0.3)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 143 and "two.csv" not in {path.name for path in (tmp_path / "in").iterdir()}
    assert "Traceback" not in err and re.search("line 1.*'promt'", err) and "batch: 2 done" in err
    names = {str(path.relative_to(tmp_path / "in")) for path in (tmp_path / "in").rglob("*.*")}
    failed = {"failed/two.csv", "failed/array.jsonl", "failed/empty.txt"}
    assert names == {"done/one.txt", "done/three.txt", "notes.md"} | failed
    assert re.search(r"in/array\.jsonl .*JSON array", err) and re.search(r"in/empty\.txt .*no jobs", err)
    for messages in (err, (tmp_path / "log").read_text()):
        assert messages.count("in/notes.md is not a job list") == 1


def test_reports_replace_only_reports_and_can_be_written_later(cli, tmp_path, quick):
    write(tmp_path / "jobs.jsonl", {"prompt": "a"}, {"prompt": "b"})
    report, notes = tmp_path / "out/0001-a-0.png.json", tmp_path / "out/0002-b-0.png.json"
    (tmp_path / "out").mkdir()
    notes.write_text('{"mine": 1}')
    assert cli("batch", "jobs.jsonl", *quick)[0] == 0 and not report.exists()
    code, _, err = cli("batch", "jobs.jsonl", *quick, "--reports")
    assert code == 0 and json.loads(report.read_text())["already_complete"] is True
    assert notes.read_text() == '{"mine": 1}' and "0002-b-0.png.json exists" in err


def test_fresh_still_skips_complete_images(cli, tmp_path, quick):
    write(tmp_path / "jobs.jsonl", {"prompt": "a"})
    assert [cli("batch", "jobs.jsonl", *quick, "--fresh")[0] for _ in range(2)] == [0, 0]


def test_without_prompt_metadata_an_image_of_another_prompt_is_not_skipped(cli, tmp_path, quick):
    for prompt, code in (("a red house", 0), ("a blue sea", 3)):
        write(tmp_path / "jobs.jsonl", {"prompt": prompt})
        assert cli("batch", "jobs.jsonl", *quick, "--name", "{index}", "--no-prompt-metadata")[0] == code


def test_the_format_of_pipes_and_standard_input_is_detected(cli, quick, monkeypatch):
    data = b"# mine\n[[job]]\nprompt = 'a hill'\nseed = 3\n"
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    planned = (0, "planned\tout/0001-a-hill-3.png\n")
    assert cli("batch", f"/dev/fd/{reading}", *quick, "--dry-run")[:2] == planned  # like <(make-list) in a shell
    os.close(reading)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert cli("batch", "-", *quick, "--dry-run")[:2] == planned
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'[\n{"prompt": "a hill"}\n]\n')))
    code, out, err = cli("batch", "-", *quick, "--dry-run")
    assert (code, out) == (65, "") and re.search(r"Standard input .*JSON array \(line 1: '\['\).*JSONL", err)


def test_a_shard_without_jobs_is_complete(cli, quick, tmp_path):
    write(tmp_path / "jobs.txt", "a hill")
    assert cli("batch", "jobs.txt", *quick, "--shard", "2/2")[:2] == (0, "")


A1111 = ("# mine", "a hill", '--prompt "a fjord" --steps 20', "a hill --ar 16:9 --v 5", "the sea -- at dawn, C--, a--b")
NOTICE = r"jobs\.txt: 2 prompts .*options of other tools.* '--prompt' in line 3"


@pytest.mark.parametrize("more", [[], ["--seeds", "1-3"], ["--shard", "2/2"], ["--json"]])
def test_options_in_prompts_are_one_notice_per_list(cli, quick, tmp_path, more):
    write(tmp_path / "jobs.txt", *A1111)
    code, out, err = cli("batch", "jobs.txt", *quick, "--dry-run", "-q", *more)
    assert code == 0 and err.count("\n") == 1 and re.search(NOTICE, err) and "linfusion" not in out


def test_options_in_prompts_are_a_notice_before_the_first_job(cli, quick, tmp_path):
    write(tmp_path / "jobs.jsonl", {"prompt": "a hill --v 5"}, {"prompt": "a sea", "negative_prompt": "--no fog"})
    code, _, err = cli("batch", "jobs.jsonl", *quick)
    notices = list(re.finditer(r"jobs\.jsonl: 2 prompts .*options of other tools.* '--v' in line 1", err))
    assert code == 0 and len(notices) == 1 and notices[0].start() < err.index("job 1 of 2")
    assert re.search(r"'--v'.*--strict-prompt", err)
    code, _, err = cli("batch", "jobs.jsonl", *quick, "--strict-prompt", "--fresh", "--name", "strict-{index}")
    assert code == 3 and re.search("prompt .*'--v'", err) and re.search("--negative-prompt .*'--no'", err)
    write(tmp_path / "jobs.jsonl", {"prompt": "a sea--side, 16:9 -- C--"})
    assert "options of other tools" not in cli("batch", "jobs.jsonl", *quick, "--dry-run")[2]
    write(tmp_path / "jobs.jsonl", {"prompt": "a sea --v 5"})
    assert "1 prompt " in cli("batch", "jobs.jsonl", *quick, "--dry-run")[2]


def test_help_names_the_suffixes_of_lists(cli):
    help_text = cli("batch", "--help")[1]
    assert all(suffix in help_text for suffix in (".jsonl", ".ndjson", ".csv", ".toml", ".txt"))
