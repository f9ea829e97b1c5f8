"""The interval between saves: as requested, but saving takes at most 2 % of the time on a slow disk."""

import time

import pytest

from linfusion_cli.checkpoint.store import CheckpointStore
from linfusion_cli.core.geometry import Size
from linfusion_cli.run.checkpoint.manager import CheckpointManager
from linfusion_cli.run.checkpoint.state import RunState
from tests.support.requests import make_request

STEP_SEC, STEPS = 1.0, 10_000


class SlowStore(CheckpointStore):
    """A store that takes `save_sec` per save, by the simulated clock `now`."""

    def __init__(self, target, save_sec: float):
        super().__init__(target)
        self.save_sec, self.now, self.saved_at = save_sec, 0.0, []

    def save(self, metadata, state):
        self.saved_at.append(self.now)
        self.now += self.save_sec


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Return a function that simulates a run of many steps of a second each, and returns its store."""

    def run(every_sec: float, save_sec: float, phase_ends: tuple[int, ...] = ()) -> SlowStore:
        output = tmp_path / "a.png"
        store = SlowStore(output, save_sec)
        monkeypatch.setattr(time, "monotonic", lambda: store.now)
        request = make_request(
            prompt="a hill", size=Size(64, 64), output=output, model="demo", checkpoint_every=every_sec
        )
        checkpoints = CheckpointManager(store, None, request)
        for step in range(1, STEPS + 1):
            store.now += STEP_SEC
            state = RunState(steps=step)
            checkpoints.save(state) if step in phase_ends else checkpoints.maybe_save(state)
        assert checkpoints.statistics.count == len(store.saved_at)
        return store

    return run


def gaps(store: SlowStore) -> list[float]:
    """Return the seconds from the start of each save to the start of the next."""
    return [later - earlier for earlier, later in zip(store.saved_at, store.saved_at[1:], strict=False)]


@pytest.mark.parametrize(
    ("every_sec", "save_sec", "gap_sec"),
    [
        (60.0, 0.0, 60),
        (60.0, 1.0, 60),  # 1.7 % of the time
        (60.0, 1.5, 75),  # would be 2.5 % every 60 s
        (60.0, 30.0, 1500),
        (5.0, 1.0, 50),
        (600.0, 1.0, 600),
    ],
)
def test_saving_takes_two_per_cent_of_the_time_at_most(saved, every_sec, save_sec, gap_sec):
    store = saved(every_sec, save_sec)
    assert store.saved_at[0] == every_sec  # before that, the duration of a save is unknown
    assert all(gap_sec <= gap <= gap_sec + STEP_SEC for gap in gaps(store))
    assert len(store.saved_at) * save_sec <= 0.02 * store.now + save_sec


def test_interval_0_saves_every_step_even_on_a_slow_disk(saved):
    assert len(saved(every_sec=0.0, save_sec=30.0).saved_at) == STEPS


def test_the_end_of_a_phase_is_saved_at_once_and_counts(saved):
    store = saved(60.0, 30.0, phase_ends=(100, 2000, 2001))
    # The first; the phase end at step 100; 1500 s later; the phase ends at steps 2000 and 2001 (each save took 30 s).
    assert store.saved_at[:5] == [60, 100 + 30, 1630, 2000 + 3 * 30, 2001 + 4 * 30]
    assert all(gap >= 1500 for gap in gaps(store)[4:])
