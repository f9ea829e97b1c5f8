"""No two files of a run, or of a batch, share a path: a run would wait for its own lock forever."""

import json
from pathlib import Path

import pytest

from linfusion_cli.batch.filenames import FilenameRegistry
from linfusion_cli.core import fs
from linfusion_cli.core.errors import TemporaryFailure, UsageError
from linfusion_cli.images import AtomicFile
from tests.support.other_process import lock_in_other_process

SMALL = ("a hill", "--size", "128", "--steps", "2", "--strength", "0.5", "--save-phases", "-o", "v.png")


@pytest.fixture
def small(cli, xl_model):
    """Return a function that generates phases of 64 and 128 px, and saves the first as v-64x64.png."""
    return lambda *more: cli("generate", *SMALL, "--model", xl_model, *more)


@pytest.mark.parametrize("option", ["--preview", "--keep-latents", "--report"])
@pytest.mark.parametrize("name", ["v-64x64.png", "./v-64x64.png", "sub/../v-64x64.png", "link/v-64x64.png"])
def test_a_file_with_the_name_of_a_phase_is_usage(small, tmp_path, option, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(".")
    code, _, err = small(option, name)
    assert code == 2 and "v-64x64.png" in err and "another run" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "sub"]


@pytest.mark.parametrize("name", [".v.png.part", ".v-64x64.png.part"])
def test_a_file_with_the_name_of_a_temporary_one_is_usage(small, tmp_path, name):
    code, _, err = small("--keep-latents", name)
    assert code == 2 and name in err and not list(tmp_path.iterdir())


def test_a_name_that_only_looks_like_a_phase_is_none(small):
    assert small("--preview", "v-99x99.png")[0] == 0
    assert {path.name for path in Path().iterdir()} == {"v.png", "v-64x64.png", "v-99x99.png"}


@pytest.mark.parametrize("option", ["-o", "--preview", "--keep-latents", "--report"])
def test_a_loop_of_links_is_no_bug(cli, xl_model, tmp_path, option):
    """It is rejected when it is opened; the earlier comparison with other files must not fail."""
    (tmp_path / "loop.png").symlink_to("loop.png")
    code, _, err = cli(
        "generate", "x", "--model", xl_model, "--size", 64, "--steps", 1, "-o", "a.png", option, "loop.png"
    )
    assert code == 73 and "loop.png cannot be created" in err


def test_plan_reports_it_too(cli, xl_model):
    code, _, err = cli("plan", *SMALL, "--model", xl_model, "--preview", "v-64x64.png")
    assert code == 2 and "v-64x64.png" in err


def test_a_lock_that_this_process_has_is_not_waited_for(tmp_path):
    with AtomicFile(tmp_path / "a.png"):
        with pytest.raises(UsageError, match="written twice by this run"):
            AtomicFile(tmp_path / "a.png")
        (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
        with pytest.raises(UsageError, match="written twice by this run"):
            AtomicFile(tmp_path / "b.png")
    with AtomicFile(tmp_path / "a.png") as file:  # the lock was released
        file.write(b"x")
        file.commit()


def test_the_memory_for_locks_does_not_grow_with_the_files(tmp_path):
    """A batch of a hundred thousand images locks three files for each."""
    for number in range(200):
        with AtomicFile(tmp_path / f"{number}.png") as file:
            file.write(b"x")
            file.commit()
    assert len(fs._locked_here) < 100


def test_the_lock_of_another_process_still_is(tmp_path):
    with lock_in_other_process(tmp_path / ".a.png.part"), pytest.raises(TemporaryFailure):
        AtomicFile(tmp_path / "a.png")
    with AtomicFile(tmp_path / "a.png"):
        pass


@pytest.mark.parametrize(
    ("phased", "other"),
    [("a.png", "a-64x64.png"), ("sub/a.png", "sub/a-640x320.png"), ("a-1x1.png", "a-1x1-2x2.png")],
)
def test_no_file_of_a_batch_can_be_a_phase_of_another(tmp_path, phased, other):
    names = FilenameRegistry(tmp_path)
    names.reserve(phased, 1)
    names.reserve_phases(phased, 1)
    with pytest.raises(UsageError, match=f"{Path(other).name}.*phase of line 1"):
        names.reserve(other, 2)
    names = FilenameRegistry(tmp_path)
    names.reserve(other, 1)
    names.reserve(phased, 2)
    with pytest.raises(UsageError, match="phase.*file of line 1"):
        names.reserve_phases(phased, 2)
    names.reserve(phased.replace("a", "b"), 3)
    names.reserve_phases(phased.replace("a", "b"), 3)


def test_one_file_by_two_names_is_one(tmp_path):
    (tmp_path / "sub").symlink_to(".")
    names = FilenameRegistry(tmp_path)
    names.reserve("a.png", 1)
    with pytest.raises(UsageError, match="sub/a.png.*line 1"):
        names.reserve("sub/a.png", 2)


def test_a_batch_logs_collisions_as_usage_errors_and_runs_the_rest(cli, xl_model):
    jobs = [{"prompt": "a", "output": "v.png"}, {"prompt": "b", "output": "v-64x64.png"}, {"prompt": "c", "seed": 2}]
    jobs += [{"prompt": "d", "output": "w.png", "preview": "w-64x64.png"}]
    Path("jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    options = ("--size", "128", "--steps", "1", "--strength", "0.5", "--save-phases", "--model", xl_model)
    code, out, err = cli("batch", "jobs.jsonl", "--output-dir", "out", *options)
    results = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert code == 3 and {(job["line"], job["exit_code"]) for job in results} == {(1, 0), (2, 2), (3, 0), (4, 2)}
    assert Path("out/v-64x64.png").exists() and not Path("out/w.png").exists()
