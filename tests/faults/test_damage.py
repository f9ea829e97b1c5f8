"""A damaged checkpoint is set aside with a warning, or not needed; the image is never wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from threading import Lock

import pytest

from tests.faults.harness.calls import Fault
from tests.faults.harness.moments import Moment, run_in_parallel
from tests.faults.harness.trials import Lab, Trial

STATES = 5  # number of moments at which the runs that left the checkpoints were killed


@run_in_parallel
@pytest.mark.moments(short=6, long=200)
def test_a_damaged_checkpoint(lab: Lab, names: list[str], moment: Moment, states: "States"):
    name, turn = moment.pick(names)
    trial = lab.create_trial("damaged checkpoint", name)
    states.copy(trial, turn.pick(range(STATES))[0])
    damage, _ = moment.pick(DAMAGES)
    random = moment.random
    damage(random.choice(list_nonempty_files(trial.store)), random)
    run = trial.rerun_to_completion(set_aside=True)
    asides = [name for name in trial.list_leftovers() if ".aside-" in name]
    trial.count(f"{damage.__name__}: {'set aside' if asides else 'not needed'}")
    assert "Traceback" not in run.read_stderr()
    assert all(name in run.read_stderr() for name in asides)


class States:
    """The folders of killed runs, each created once."""

    def __init__(self, lab: Lab):
        self._lab, self._folders, self._lock = lab, {}, Lock()

    def copy(self, trial: Trial, number: int) -> None:
        """Replace the folder of `trial` by a copy of the given state of its request."""
        key = trial.name, number
        with self._lock:
            if key not in self._folders:
                self._folders[key] = self._create(*key)
        shutil.rmtree(trial.folder)
        shutil.copytree(self._folders[key], trial.folder)

    def _create(self, name: str, number: int) -> Path:
        source = self._lab.create_trial("states", name)
        saves = [int(call.split()[0]) for call in source.expected.calls if ".linfusion" in call and "replace" in call]
        at = saves[(number + 1) * len(saves) // (STATES + 1)] + 1
        assert source.start(Fault(at=at)).wait() == 137
        assert source.has_checkpoint
        return source.folder


@pytest.fixture(scope="module")
def states(lab: Lab) -> States:
    return States(lab)


def list_nonempty_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint, without the lock file, which is empty."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size)


def truncate_file(path: Path, random: Random) -> None:
    with path.open("r+b") as file:
        file.truncate(random.randrange(path.stat().st_size))


def flip_bit(path: Path, random: Random) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def overwrite_page(path: Path, random: Random) -> None:
    """Overwrite a page with zeros or noise, as after a crash of the machine."""
    data = bytearray(path.read_bytes())
    start = random.randrange(len(data))
    length = len(data[start : start + 4096])
    data[start : start + length] = random.choice([bytes(length), random.randbytes(length)])
    path.write_bytes(data)


def empty_file(path: Path, random: Random) -> None:
    path.write_bytes(b"")


def delete_file(path: Path, random: Random) -> None:
    path.unlink()


def append_garbage(path: Path, random: Random) -> None:
    with path.open("ab") as file:
        file.write(random.randbytes(random.randint(1, 64)))


def swap_files(path: Path, random: Random) -> None:
    """Swap the contents with another file of the checkpoint."""
    other = random.choice([other for other in list_nonempty_files(path.parent) if other != path])
    contents = other.read_bytes(), path.read_bytes()
    path.write_bytes(contents[0])
    other.write_bytes(contents[1])


DAMAGES: list[Callable[[Path, Random], None]] = [
    truncate_file,
    flip_bit,
    overwrite_page,
    truncate_file,
    flip_bit,
    delete_file,
    empty_file,
    append_garbage,
    swap_files,
]
