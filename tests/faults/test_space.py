"""No space left: what was made is kept, nothing half stands under a final name, and with room the same command ends."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness.calls import WRITES, Fault
from tests.faults.harness.moments import Moment, side_by_side
from tests.faults.harness.runs import NOT_WRITTEN
from tests.faults.harness.trials import Lab

DISK_BYTES, PAGE_BYTES = 16 << 20, 4096
LEAST_BYTES = 16 << 10  # of a file: what the tests themselves note has room


@pytest.fixture(scope="module")
def small_disk(lab: Lab) -> Iterator[Path]:
    folder = lab.folder / "disk"
    folder.mkdir()
    options = f"size={DISK_BYTES},mode=755"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"nothing may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.moments(short=1, long=50)
def test_a_disk_that_fills(lab: Lab, small_disk: Path, names: list[str], moment: Moment):
    name, moment = moment.dealt(names)
    trial = lab.trial("disk full", name, small_disk)
    run, filler = trial.start(), small_disk / "filler"
    trial.reaches(run, moment.share)
    fill(filler, spared_bytes=moment.random.choice([0, 0, 1, 2, 4, 8, 16]) * PAGE_BYTES)
    trial.count(f"exit {run.wait()} in {run.place()}")
    filler.unlink()
    assert run.code in (0, NOT_WRITTEN), run.stderr()
    trial.recovers(run)
    trial.clear()


@side_by_side
@pytest.mark.moments(short=1, long=50)
def test_a_write_that_finds_no_space(lab: Lab, names: list[str], moment: Moment):
    """From one write on there is none, for nobody."""
    name, moment = moment.dealt(names)
    trial = lab.trial("writes find no space", name)
    writes = [call for call in trial.expected.calls if call.split()[1] in WRITES]
    at = moment.number(len(writes))
    run = trial.start(Fault(calls=WRITES, at=at, effect="fail", error="ENOSPC", onwards=True))
    trial.count(f"exit {run.wait()} in {run.place()}")
    assert run.code in (0, NOT_WRITTEN), run.stderr()
    trial.recovers(run)


@side_by_side
@pytest.mark.moments(short=1, long=20)
def test_a_file_that_may_not_grow(lab: Lab, names: list[str], moment: Moment):
    """ulimit -f: pictures end there, or the state of the run."""
    name, moment = moment.dealt(names)
    trial = lab.trial("ulimit -f", name)
    largest = max(len(data) for data in trial.expected.files.values())
    run = trial.start(limits={"file": LEAST_BYTES + int(moment.share * (largest - LEAST_BYTES))})
    trial.count(f"exit {run.wait()} in {run.place()}")
    assert run.code in (0, NOT_WRITTEN), run.stderr()
    trial.recovers(run)


def test_a_image_without_room_costs_the_next_run_only_its_decoding(lab: Lab):
    trial = lab.trial("no room for the picture", "png")
    last = sum(call.split()[1] == "pwrite" for call in trial.expected.calls)
    run = trial.start(Fault(calls=("pwrite",), at=last, effect="fail", error="ENOSPC", onwards=True))
    assert run.wait() == NOT_WRITTEN and "No space left" in run.stderr()
    assert trial.has_journal
    assert trial.completes().steps() == []


def fill(filler: Path, spared_bytes: int) -> None:
    """Take the disk's last byte, then give some back."""
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                continue
        except OSError:
            file.truncate(max(0, file.tell() - spared_bytes))
