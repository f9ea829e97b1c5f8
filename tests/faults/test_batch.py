"""The real program over a list of jobs: lines that are none harm no other, and a batch that was killed goes on."""

import json
from pathlib import Path

import pytest

from tests.batch.test_parsers import hostile_json
from tests.faults.harness.moments import Moment, side_by_side
from tests.faults.harness.requests import STEPS
from tests.faults.harness.runs import Run
from tests.faults.harness.trials import Lab

SOME_FAILED = 3
OPTIONS = ("--output-dir", "out", "--preset", "demo", "--size", "96", "--base-size", "64", *STEPS, "0")
GOOD = [b'{"prompt": "a hill", "seed": 1}', b'{"prompt": "the sea", "seed": 2}', b'{"prompt": "a lake", "seed": 3}']
IMAGES = ["0001-a-hill-1.tif", "0002-the-sea-2.tif", "0003-a-lake-3.tif"]
OUTSIDE = [
    (b'{"prompt": "a", "output": "../../x.png"}', "leaves the folder"),
    (b'{"prompt": "a", "output": "/x.png"}', "must not begin with /"),
    (b'{"prompt": "a", "size": "1000000x1000000"}', "free"),
]


def test_two_hundred_hostile_lines(lab: Lab):
    hostile = [*hostile_json(), *OUTSIDE]
    assert len(hostile) >= 200
    folder = begun(lab, "hostile", [GOOD[0], *[line for line, _ in hostile], GOOD[1]])
    run = lab.server.run(("batch", "jobs.jsonl", *OPTIONS), folder)
    assert run.code == SOME_FAILED, run.stderr()[-2000:]
    results = {found["line"]: found for found in map(json.loads, lines(folder))}
    assert len(results) == len(hostile) + 2
    for number, (line, reason) in enumerate(hostile, 2):
        assert results[number]["status"] == "failed" and reason in results[number]["error"], line[:80]
    good = [results[1], results[len(hostile) + 2]]
    assert [found["status"] for found in good] == ["done", "done"]
    outputs = [Path(found["output"]).name for found in good]
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted([*outputs, "results.jsonl"])
    assert sorted(path.name for path in folder.iterdir()) == ["jobs.jsonl", "out"]
    lab.count("hostile lines", f"{len(hostile)} refused, 2 pictures made")


@side_by_side
@pytest.mark.moments(short=1, long=30)
def test_a_batch_that_was_killed(lab: Lab, whole: tuple[Run, Path], moment: Moment):
    undisturbed, expected = whole
    folder = begun(lab, f"batch-{moment}", GOOD)
    run = lab.server.start(("batch", "jobs.jsonl", *OPTIONS), folder)
    run.reaches(moment.share * undisturbed.seconds, undisturbed.timeline())
    lab.count("batch", f"killed after {len(list(folder.glob('out/*.tif')))} pictures" if run.kill() else "complete")
    for path in folder.glob("out/*.tif"):
        assert path.read_bytes() == (expected / "out" / path.name).read_bytes()
    last = lab.server.run(("batch", "jobs.jsonl", *OPTIONS), folder)
    assert last.code == 0, last.stderr()
    assert sorted(path.name for path in (folder / "out").iterdir()) == [*IMAGES, "results.jsonl"]
    for name in IMAGES:
        assert (folder / "out" / name).read_bytes() == (expected / "out" / name).read_bytes()
    assert {found["line"] for found in map(json.loads, lines(folder)) if found["exit_code"] == 0} == {1, 2, 3}


@pytest.fixture(scope="module")
def whole(lab: Lab) -> tuple[Run, Path]:
    """A batch that nothing happened to, and its folder."""
    folder = begun(lab, "batch", GOOD)
    run = lab.server.run(("batch", "jobs.jsonl", *OPTIONS), folder)
    assert run.code == 0, run.stderr()
    assert sorted(path.name for path in (folder / "out").iterdir()) == [*IMAGES, "results.jsonl"]
    return run, folder


def begun(lab: Lab, name: str, jobs: list[bytes]) -> Path:
    """A new folder with this list of jobs."""
    folder = lab.folder / name
    folder.mkdir()
    (folder / "jobs.jsonl").write_bytes(b"\n".join(jobs) + b"\n")
    return folder


def lines(folder: Path) -> list[str]:
    return (folder / "out" / "results.jsonl").read_text().splitlines()
