"""SIGKILL at any moment: the same command completes, bit-identical, and no final name ever holds a part of a file."""

import pytest

from tests.faults.harness.calls import Fault
from tests.faults.harness.moments import Moment, side_by_side
from tests.faults.harness.requests import ALL_CALLS
from tests.faults.harness.runs import Run
from tests.faults.harness.trials import Lab, Trial

IMPORTS_SEC = 8.0
SOONER = 0.98  # where a run that was to be killed has ended before
AGAIN = 0.35  # of the runs that go on, so many are killed too


@side_by_side
@pytest.mark.moments(short=6, long=200)
def test_killed_at_a_random_moment(lab: Lab, names: list[str], moment: Moment):
    name, moment = moment.dealt(names)
    trial, run = killed(lab, name, moment.share)
    random = moment.random
    while trial.has_journal and random.random() < AGAIN:
        run = trial.start()
        trial.reaches(run, random.random())
        run.kill()
    trial.goes_on(run, trial.request.saves_each_step)


@side_by_side
@pytest.mark.moments(short=2, long=380)
def test_killed_at_a_call_that_changes_files(lab: Lab, moment: Moment):
    """Before the call, or with half of what it was to write; the long version meets every call."""
    name, moment = moment.dealt(ALL_CALLS)
    trial = lab.trial("killed at a call", name)
    at = moment.number(len(trial.expected.calls))
    run = trial.start(Fault(at=at, effect=moment.random.choice(["kill", "tear"])))
    assert run.wait() == 137, run.stderr()
    assert len(run.calls()) == at
    trial.goes_on(run, trial.request.saves_each_step)


@side_by_side
@pytest.mark.moments(short=1, long=10)
def test_killed_as_it_imports(lab: Lab, moment: Moment):
    trial = lab.trial("killed, truly started", "png")
    run = trial.start_truly()
    run.ended(moment.share * IMPORTS_SEC)
    trial.count("killed" if run.kill() else "complete")
    trial.completes()


def killed(lab: Lab, name: str, share: float) -> tuple[Trial, Run]:
    """A run that was killed after a share of its life; one that was quicker than that is not counted."""
    while True:
        trial = lab.trial("killed", name)
        run = trial.start()
        trial.reaches(run, share)
        if run.kill():
            return trial, run
        share *= SOONER
