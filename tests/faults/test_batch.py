"""The program with a list of jobs: invalid lines do not affect other jobs, and a killed batch resumes."""

import json
from pathlib import Path

import pytest

from tests.batch.test_parsers import hostile_json
from tests.faults.harness.moments import Moment, run_in_parallel
from tests.faults.harness.requests import STEPS
from tests.faults.harness.runs import Run
from tests.faults.harness.trials import Lab

SOME_FAILED = 3
OPTIONS = ("--output-dir", "out", "--preset", "demo", "--size", "96", "--base-size", "64", *STEPS, "0")
GOOD = [b'{"prompt": "a hill", "seed": 1}', b'{"prompt": "the sea", "seed": 2}', b'{"prompt": "a lake", "seed": 3}']
IMAGES = ["0001-a-hill-1.tif", "0002-the-sea-2.tif", "0003-a-lake-3.tif"]
OUTSIDE = [
    (b'{"prompt": "a", "output": "../../x.png"}', "../../x.png"),
    (b'{"prompt": "a", "output": "/x.png"}', "/x.png"),
    (b'{"prompt": "a", "size": "1000000x1000000"}', "free"),
]


def test_two_hundred_hostile_lines(lab: Lab):
    hostile = [*hostile_json(), *OUTSIDE]
    assert len(hostile) >= 200
    folder = prepare_list(lab, "hostile", [GOOD[0], *[line for line, _ in hostile], GOOD[1]])
    run = lab.server.run(("batch", "jobs.jsonl", *OPTIONS), folder)
    assert run.code == SOME_FAILED, run.read_stderr()[-2000:]
    results = {result["line"]: result for result in map(json.loads, read_results(folder))}
    assert len(results) == len(hostile) + 2
    for number, (line, reason) in enumerate(hostile, 2):
        assert results[number]["status"] == "failed" and reason in results[number]["error"], line[:80]
    good = [results[1], results[len(hostile) + 2]]
    assert [result["status"] for result in good] == ["done", "done"]
    outputs = [Path(result["output"]).name for result in good]
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted([*outputs, "results.jsonl"])
    assert sorted(path.name for path in folder.iterdir()) == ["jobs.jsonl", "out"]
    lab.count("hostile lines", f"{len(hostile)} rejected, 2 images written")


@run_in_parallel
@pytest.mark.moments(short=1, long=30)
def test_a_batch_that_was_killed(lab: Lab, complete_batch: tuple[Run, Path], moment: Moment):
    reference, expected = complete_batch
    folder = prepare_list(lab, f"batch-{moment}", GOOD)
    run = lab.server.start(("batch", "jobs.jsonl", *OPTIONS), folder)
    run.wait_for_progress(moment.share * reference.seconds, reference.read_timeline())
    lab.count("batch", f"killed after {len(list(folder.glob('out/*.tif')))} images" if run.kill() else "complete")
    for path in folder.glob("out/*.tif"):
        assert path.read_bytes() == (expected / "out" / path.name).read_bytes()
    last = lab.server.run(("batch", "jobs.jsonl", *OPTIONS), folder)
    assert last.code == 0, last.read_stderr()
    assert sorted(path.name for path in (folder / "out").iterdir()) == [*IMAGES, "results.jsonl"]
    for name in IMAGES:
        assert (folder / "out" / name).read_bytes() == (expected / "out" / name).read_bytes()
    results = map(json.loads, read_results(folder))
    assert {result["line"] for result in results if result["exit_code"] == 0} == {1, 2, 3}


@pytest.fixture(scope="module")
def complete_batch(lab: Lab) -> tuple[Run, Path]:
    """Run a batch without a fault; return the run and its folder."""
    folder = prepare_list(lab, "batch", GOOD)
    run = lab.server.run(("batch", "jobs.jsonl", *OPTIONS), folder)
    assert run.code == 0, run.read_stderr()
    assert sorted(path.name for path in (folder / "out").iterdir()) == [*IMAGES, "results.jsonl"]
    return run, folder


def prepare_list(lab: Lab, name: str, jobs: list[bytes]) -> Path:
    """Create a folder with a list of jobs."""
    folder = lab.folder / name
    folder.mkdir()
    (folder / "jobs.jsonl").write_bytes(b"\n".join(jobs) + b"\n")
    return folder


def read_results(folder: Path) -> list[str]:
    """Return the lines of the results file."""
    return (folder / "out" / "results.jsonl").read_text().splitlines()
