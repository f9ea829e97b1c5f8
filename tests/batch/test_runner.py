"""A batch: every result is logged, a failed job does not stop the others, and no two jobs share a file."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from linfusion_cli.batch.parsers.job_spec import JobSpec
from linfusion_cli.batch.results import ResultsLog
from linfusion_cli.batch.shard import Shard
from linfusion_cli.core.errors import CannotCreateOutput, DataError, Stopped, TemporaryFailure, WriteFailed
from linfusion_cli.core.events import JobStarted
from tests.batch.helpers import builder, failing, job_specs, run_batch
from tests.support.fakes import Listener


@pytest.fixture
def batch(tmp_path):
    """`run_batch` in tmp_path/out."""
    return partial(run_batch, tmp_path / "out")


def read_results(folder: Path, name: str = "results.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]


def test_errors_are_logged_and_the_next_job_runs(batch, tmp_path):
    errors = {
        "hill 2": DataError("The weights are broken.", "Get others."),
        "hill 3": ZeroDivisionError("oops"),
        "hill 4": MemoryError(),
        "hill 5": TemporaryFailure("Another run is writing this."),
    }
    listener = Listener()
    collector, runner = batch([*job_specs(6), JobSpec(9, problem="It is wrong.")], failing(errors), listener)
    results = read_results(tmp_path)
    assert [(line["line"], line["status"], line["exit_code"]) for line in results] == [
        (9, "failed", 2),
        (1, "done", 0),
        (2, "failed", 65),
        (3, "failed", 70),
        (4, "failed", 71),
        (5, "locked", 75),
        (6, "done", 0),
    ]
    assert [line["error"] for line in results[2:4]] == ["The weights are broken. Get others.", "bug oops"]
    assert results[1]["output"] == str(tmp_path / "out/0001-hill-1-0.png") and results[1]["prompt"] == "hill 1"
    assert results[1]["index"] == 1 and results[1]["seed"] == 0 and results[1]["time"][10] == "T"
    assert runner.summary.exit_code == 3 and len(runner.failures) == 4
    assert [(event.number, event.count, event.name) for event in listener.of(JobStarted)][:2] == [
        (2, 7, "0001-hill-1-0.png"),
        (3, 7, "0002-hill-2-0.png"),
    ]


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ({}, 0),
        ({"hill 1": TemporaryFailure("Locked.")}, 75),
        ({"hill 1": TemporaryFailure("Locked."), "hill 2": DataError("Broken.")}, 3),
    ],
)
def test_the_exit_code_follows_from_the_results(batch, errors, code):
    assert batch(job_specs(3), failing(errors))[1].summary.exit_code == code


def test_stop_on_error_ends_the_batch_at_the_first_error(batch, tmp_path):
    batch(job_specs(4), failing({"hill 2": DataError("Broken.")}), stop_on_error=True)
    assert [line["status"] for line in read_results(tmp_path)] == ["done", "failed"]


def test_a_stop_keeps_the_logged_results(batch, tmp_path):
    with pytest.raises(Stopped):
        batch(job_specs(4), failing({"hill 3": Stopped(signal.SIGTERM)}))
    assert [line["line"] for line in read_results(tmp_path)] == [1, 2]


def test_jobs_that_share_a_model_run_together_in_the_order_of_the_list(batch):
    ran = []
    models = ["a", "b", "a", "c", "b", "a"]
    batch([JobSpec(line, {"model": model}) for line, model in enumerate(models, 1)], failing({}, ran))
    assert [(request.model, int(request.execution.output.name[:4])) for request in ran] == [
        ("a", 1), ("a", 3), ("a", 6), ("b", 2), ("b", 5), ("c", 4),
    ]  # fmt: skip


def test_seeds_multiply_jobs_that_have_none_and_shards_divide_them(batch, tmp_path):
    jobs = [*job_specs(3), JobSpec(4, {"prompt": "own", "seed": 99}), JobSpec(5, problem="It is wrong.")]
    seen = []
    for number in (1, 2, 3):
        batch(jobs, failing({}, seen), seeds=(1, 2, 3, 4), shard=Shard(number, 3))
    names = sorted(request.execution.output.name for request in seen)
    hills = [f"000{i}-hill-{i}-{seed}.png" for i in (1, 2, 3) for seed in (1, 2, 3, 4)]
    assert names == [*hills, "0004-own-99.png"]
    results = [read_results(tmp_path, f"results-{number}-of-3.jsonl") for number in (1, 2, 3)]
    assert sorted(map(len, results)) == [4, 5, 5]
    assert sum(line["status"] == "failed" for shard in results for line in shard) == 1


def test_two_jobs_never_have_one_file(batch, tmp_path):
    ran = []
    names = ["a.png", "sub/a.png", "a.png", "../a.png", "a.gif"]
    jobs = [JobSpec(line, {"output": name}) for line, name in enumerate(names, 1)]
    collector, _ = batch(jobs, failing({}, ran), build=builder(format=None))
    assert [request.execution.output for request in ran] == [tmp_path / "out/a.png", tmp_path / "out/sub/a.png"]
    errors = {result.line: result.error for result in collector.results if result.error}
    assert "line 1" in errors[3] and "'../a.png'" in errors[4] and "a.gif" in errors[5]


def test_a_preview_is_inside_the_folder_and_reserved(batch, tmp_path):
    ran = []
    jobs = [JobSpec(1, {"preview": "p.jpg"}), JobSpec(2, {"preview": "p.jpg"}), JobSpec(3, {"output": "p.jpg"})]
    collector, _ = batch(jobs, failing({}, ran))
    assert [request.execution.preview for request in ran] == [tmp_path / "out/p.jpg"]
    assert collector.status() == {1: "done", 2: "failed", 3: "failed"}


def test_a_line_of_the_record_is_whole_or_not_there(batch, tmp_path):
    batch(job_specs(2), failing({}))
    path = tmp_path / "out/results.jsonl"
    whole = path.read_bytes()
    for half in (b'{"list": "jo', b"x" * 10_000, b"\0"):
        path.write_bytes(whole + half)
        batch(job_specs(1), failing({}))
        assert path.read_bytes().startswith(whole) and len(read_results(tmp_path)) == 3
    path.write_bytes(b"no line at all")
    batch(job_specs(1), failing({}))
    assert len(read_results(tmp_path)) == 1


def test_a_full_disk_ends_the_batch_without_a_partial_line(batch, tmp_path, monkeypatch):
    monkeypatch.setattr("os.write", lambda fd, data: os.pwrite(fd, data[:10], os.fstat(fd).st_size))
    with pytest.raises(WriteFailed, match=r"results\.jsonl"):
        batch(job_specs(2), failing({}))
    assert (tmp_path / "out/results.jsonl").read_bytes() == b""
    with pytest.raises(CannotCreateOutput):
        ResultsLog(tmp_path / "out/results.jsonl/x")


KILLED = """
import sys
from pathlib import Path
from linfusion_cli.batch.results import JobResult, ResultsLog
results_log = ResultsLog(Path(sys.argv[1]))
values = "x" * 300, "out/" + "y" * 200, 1.5, 1 << 30, None, "z" * 120, 2**62, "2026-11-26T08:01:53+00:00"
print("ready", flush=True)
for line in range(1_000_000):
    results_log.append(JobResult("jobs.jsonl", line, line, "failed", 65, *values))
"""


def test_a_kill_leaves_no_partial_line_before_the_last(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    (tmp_path / "out").mkdir()
    for after_sec in (0.05, 0.1, 0.23):
        run = subprocess.Popen(
            [sys.executable, "-c", KILLED, tmp_path / "out/results.jsonl"], stdout=-1, env=environment
        )
        assert run.stdout.readline() == b"ready\n"
        time.sleep(after_sec)
        run.kill()
        run.communicate()
    assert (tmp_path / "out/results.jsonl").read_bytes().endswith(b"\n") and len(read_results(tmp_path)) > 3
