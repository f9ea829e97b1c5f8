"""A full disk: the state is kept, no output is partial, and the same command completes when there is space."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness.calls import WRITES, Fault
from tests.faults.harness.moments import Moment, run_in_parallel
from tests.faults.harness.runs import NOT_WRITTEN
from tests.faults.harness.trials import Lab

DISK_BYTES, PAGE_BYTES = 16 << 20, 4096
MIN_FILE_BYTES = 16 << 10  # the limit must not affect the log files of the tests


@pytest.fixture(scope="module")
def small_disk(lab: Lab) -> Iterator[Path]:
    folder = lab.folder / "disk"
    folder.mkdir()
    options = f"size={DISK_BYTES},mode=755"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.moments(short=1, long=50)
def test_a_disk_that_fills(lab: Lab, small_disk: Path, names: list[str], moment: Moment):
    name, moment = moment.pick(names)
    trial = lab.create_trial("disk full", name, small_disk)
    run, filler = trial.start(), small_disk / "filler"
    trial.wait_for_share(run, moment.share)
    fill(filler, spared_bytes=moment.random.choice([0, 0, 1, 2, 4, 8, 16]) * PAGE_BYTES)
    trial.count(f"exit {run.wait()} in {run.find_last_stage()}")
    filler.unlink()
    assert run.code in (0, NOT_WRITTEN), run.read_stderr()
    trial.check_recovery(run)
    trial.clear()


@run_in_parallel
@pytest.mark.moments(short=1, long=50)
def test_a_write_without_space(lab: Lab, names: list[str], moment: Moment):
    """All writes from a certain one on fail."""
    name, moment = moment.pick(names)
    trial = lab.create_trial("writes fail with ENOSPC", name)
    writes = [call for call in trial.expected.calls if call.split()[1] in WRITES]
    at = moment.pick_number(len(writes))
    run = trial.start(Fault(calls=WRITES, at=at, effect="fail", error="ENOSPC", onwards=True))
    trial.count(f"exit {run.wait()} in {run.find_last_stage()}")
    assert run.code in (0, NOT_WRITTEN), run.read_stderr()
    trial.check_recovery(run)


@run_in_parallel
@pytest.mark.moments(short=1, long=20)
def test_a_file_size_limit(lab: Lab, names: list[str], moment: Moment):
    """ulimit -f, reached by an image or by the state of the run."""
    name, moment = moment.pick(names)
    trial = lab.create_trial("ulimit -f", name)
    largest = max(len(data) for data in trial.expected.files.values())
    run = trial.start(limits={"file": MIN_FILE_BYTES + int(moment.share * (largest - MIN_FILE_BYTES))})
    trial.count(f"exit {run.wait()} in {run.find_last_stage()}")
    assert run.code in (0, NOT_WRITTEN), run.read_stderr()
    trial.check_recovery(run)


def test_after_a_full_disk_the_next_run_only_decodes(lab: Lab):
    trial = lab.create_trial("no space for the image", "png")
    last = sum(call.split()[1] == "pwrite" for call in trial.expected.calls)
    run = trial.start(Fault(calls=("pwrite",), at=last, effect="fail", error="ENOSPC", onwards=True))
    assert run.wait() == NOT_WRITTEN and "No space left" in run.read_stderr()
    assert trial.has_checkpoint
    assert trial.rerun_to_completion().list_steps() == []


def fill(filler: Path, spared_bytes: int) -> None:
    """Fill the disk completely, then free some bytes."""
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                continue
        except OSError:
            file.truncate(max(0, file.tell() - spared_bytes))
