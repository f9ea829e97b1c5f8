"""SIGKILL at any moment: the same command completes, bit-identical, and no final name ever holds a part of a file."""

import time

import pytest

from tests.faults.calls import Fault
from tests.faults.moments import Moment, side_by_side
from tests.faults.runs import Run
from tests.faults.trials import Lab, Trial, lost

AGAIN = 0.35  # of the runs that go on, so many are killed too


@side_by_side
@pytest.mark.moments(short=6, long=200)
def test_killed_at_a_random_moment(lab: Lab, names: list[str], moment: Moment):
    name, moment = moment.dealt(names)
    trial, run = killed(lab, name, moment.share)
    random = moment.random
    while trial.has_journal and random.random() < AGAIN:
        run = trial.start()
        kill_after(run, random.random() * trial.expected.seconds)
    goes_on(trial, run)


@side_by_side
@pytest.mark.moments(short=2, long=400)
def test_killed_at_a_call_that_changes_files(lab: Lab, names: list[str], moment: Moment):
    """Before the call, or with half of what it was to write."""
    name, moment = moment.dealt(names)
    trial = lab.trial("killed at a call", name)
    at = moment.number(len(trial.expected.calls))
    run = trial.start(Fault(at=at, effect="kill" if moment.index % 2 else "tear"))
    assert run.wait() == 137, run.stderr()
    assert len(run.calls()) == at
    goes_on(trial, run)


@side_by_side
@pytest.mark.moments(short=1, long=10)
def test_killed_as_it_imports(lab: Lab, moment: Moment):
    trial = lab.trial("killed, truly started", "png")
    run = trial.start_truly()
    trial.count("killed" if kill_after(run, moment.share * 8) else "complete")
    trial.completes()


def killed(lab: Lab, name: str, share: float) -> tuple[Trial, Run]:
    """A run that was killed after a share of its life; one that was quicker than that is not counted."""
    life_sec = lab.undisturbed(name).seconds
    while True:
        trial = lab.trial("killed", name)
        run = trial.start()
        if kill_after(run, share * life_sec):
            return trial, run
        life_sec = run.seconds


def kill_after(run: Run, seconds: float) -> bool:
    """Kill it when it is so old; whether that was before its end."""
    time.sleep(max(0.0, run.began + seconds - time.monotonic()))
    return run.kill()


def goes_on(trial: Trial, run: Run) -> None:
    """What was begun is completed, from the last step that was saved."""
    had_journal = trial.has_journal
    trial.count(run.place())
    trial.count("(resumed)" if had_journal else "(begun anew)")
    last = trial.completes()
    if had_journal and trial.request.saves_each_step:
        assert lost(run, last) == []
