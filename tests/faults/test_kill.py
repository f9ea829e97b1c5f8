"""SIGKILL at any moment: the same command completes, bit-identical, and no final name ever holds a part of a file."""

import time

import pytest

from tests.faults.calls import Fault
from tests.faults.moments import Moment
from tests.faults.runs import Run
from tests.faults.trials import Lab, Trial, repeated

AGAIN = 0.35  # of the runs that go on, so many are killed too


@pytest.mark.moments(short=8, long=200)
def test_killed_at_a_random_moment(lab: Lab, names: list[str], moment: Moment):
    trial = lab.trial("killed", moment.one_of(names))
    killed, random = kill(trial, moment.share), moment.random
    while random.random() < AGAIN and trial.has_journal:
        kill(trial, random.random() * 0.7)
    goes_on(trial, killed)


@pytest.mark.moments(short=3, long=400)
def test_killed_at_a_call_that_changes_files(lab: Lab, names: list[str], moment: Moment):
    """Before the call, or with half of what it was to write."""
    name = moment.one_of(names)
    turn = Moment(moment.index // len(names), -(-moment.count // len(names)))
    calls = lab.undisturbed(name).calls
    trial = lab.trial("killed at a call", name)
    at = turn.number(len(calls))
    run = trial.start(Fault(at=at, effect="tear" if (turn.index // len(calls)) % 2 == 0 else "kill"))
    assert run.wait() == 137, run.stderr()
    assert len(run.calls()) == at
    goes_on(trial, run)


@pytest.mark.moments(short=1, long=10)
def test_killed_while_it_starts(lab: Lab, moment: Moment):
    """A process that imports its libraries itself."""
    trial = lab.trial("killed, truly started", "png")
    run = trial.start_truly()
    run.ended(moment.share * 8)
    trial.count("killed" if run.kill() else "complete")
    trial.completes()


def kill(trial: Trial, share: float) -> Run:
    """Begin a run and kill it after a share of its life, or, where it is quicker than that, sooner the next time."""
    while True:
        run = trial.start()
        time.sleep(share * trial.expected.seconds)
        if run.kill():
            return run
        if trial.expected and run.code == 0:
            trial = trial.fresh()
        share *= 0.9


def goes_on(trial: Trial, killed: Run) -> None:
    """The next run completes it, from the last step that was saved."""
    had_journal = trial.has_journal
    trial.count(killed.place())
    run = trial.completes()
    trial.count("(resumed)" if had_journal else "(begun anew)")
    if had_journal:
        assert len(repeated(killed, run)) <= 1
