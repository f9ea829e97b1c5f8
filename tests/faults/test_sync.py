"""A failing fsync or rename, at each one that a run makes: once, or from then on."""

import pytest

from tests.faults.harness.calls import SYNCS, Fault
from tests.faults.harness.moments import Moment, side_by_side
from tests.faults.harness.requests import ALL_CALLS
from tests.faults.harness.runs import CANNOT_CREATE, NOT_WRITTEN
from tests.faults.harness.trials import Lab

FAILING = (*SYNCS, "rename", "replace", "link")


@side_by_side
@pytest.mark.moments(short=2, long=170)
def test_a_failing_sync_or_rename(lab: Lab, moment: Moment):
    name, moment = moment.dealt(ALL_CALLS)
    trial = lab.trial("failing fsync or rename", name)
    failing = [call.split()[1] for call in trial.expected.calls if call.split()[1] in FAILING]
    at = moment.number(len(failing))
    run = trial.start(
        Fault(FAILING, at, "fail", moment.dealt(["EIO", "EROFS"])[0], onwards=moment.random.random() < 0.5)
    )
    trial.count(f"exit {run.wait()} at {failing[at - 1]}")
    assert run.code in (0, NOT_WRITTEN) or (run.code == CANNOT_CREATE and run.steps() == []), run.stderr()
    trial.recovers(run)
