"""A journal that is not what was saved: it is set aside, and said so, or was not needed; never a wrong picture."""

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from threading import Lock

import pytest

from tests.faults.harness.calls import Fault
from tests.faults.harness.moments import Moment, side_by_side
from tests.faults.harness.trials import Lab, Trial

STATES = 5  # different moments at which the runs of the journals were killed


@side_by_side
@pytest.mark.moments(short=6, long=200)
def test_a_damaged_journal(lab: Lab, names: list[str], moment: Moment, states: "States"):
    name, turn = moment.dealt(names)
    trial = lab.trial("damaged journal", name)
    states.copy(trial, turn.dealt(range(STATES))[0])
    damage, _ = moment.dealt(DAMAGES)
    random = moment.random
    damage(random.choice(full(trial.store)), random)
    run = trial.completes(aside=True)
    asides = [name for name in trial.left_over() if ".aside-" in name]
    trial.count(f"{damage.__name__}: {'set aside' if asides else 'not needed'}")
    assert "Traceback" not in run.stderr()
    assert all(name in run.stderr() for name in asides)


class States:
    """Folders as killed runs left them, each made once."""

    def __init__(self, lab: Lab):
        self._lab, self._made, self._one_at_a_time = lab, {}, Lock()

    def copy(self, trial: Trial, number: int) -> None:
        """Let `trial` begin with the number-th state of its request."""
        key = trial.name, number
        with self._one_at_a_time:
            if key not in self._made:
                self._made[key] = self._make(*key)
        shutil.rmtree(trial.folder)
        shutil.copytree(self._made[key], trial.folder)

    def _make(self, name: str, number: int) -> Path:
        source = self._lab.trial("states", name)
        saves = [int(call.split()[0]) for call in source.expected.calls if ".linfusion" in call and "replace" in call]
        at = saves[(number + 1) * len(saves) // (STATES + 1)] + 1
        assert source.start(Fault(at=at)).wait() == 137
        assert source.has_journal
        return source.folder


@pytest.fixture(scope="module")
def states(lab: Lab) -> States:
    return States(lab)


def full(folder: Path) -> list[Path]:
    """The files of a journal in which there is anything: a lock is an empty one."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size)


def truncated(path: Path, random: Random) -> None:
    with path.open("r+b") as file:
        file.truncate(random.randrange(path.stat().st_size))


def flipped(path: Path, random: Random) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def scrambled(path: Path, random: Random) -> None:
    """A page of zeros, or of noise: what a crash of the machine may leave."""
    data = bytearray(path.read_bytes())
    start = random.randrange(len(data))
    length = len(data[start : start + 4096])
    data[start : start + length] = random.choice([bytes(length), random.randbytes(length)])
    path.write_bytes(data)


def emptied(path: Path, random: Random) -> None:
    path.write_bytes(b"")


def missing(path: Path, random: Random) -> None:
    path.unlink()


def lengthened(path: Path, random: Random) -> None:
    with path.open("ab") as file:
        file.write(random.randbytes(random.randint(1, 64)))


def exchanged(path: Path, random: Random) -> None:
    """With another file of the journal."""
    other = random.choice([other for other in full(path.parent) if other != path])
    contents = other.read_bytes(), path.read_bytes()
    path.write_bytes(contents[0])
    other.write_bytes(contents[1])


DAMAGES: list[Callable[[Path, Random], None]] = [
    truncated,
    flipped,
    scrambled,
    truncated,
    flipped,
    missing,
    emptied,
    lengthened,
    exchanged,
]
