"""A failing fsync or rename at each call of a run: once, or all from then on."""

import pytest

from tests.faults.harness.calls import SYNCS, Fault
from tests.faults.harness.moments import Moment, run_in_parallel
from tests.faults.harness.requests import ALL_CALLS
from tests.faults.harness.runs import CANNOT_CREATE, NOT_WRITTEN
from tests.faults.harness.trials import Lab

FAILING = (*SYNCS, "rename", "replace", "link")


@run_in_parallel
@pytest.mark.moments(short=2, long=170)
def test_a_failing_sync_or_rename(lab: Lab, moment: Moment):
    name, moment = moment.pick(ALL_CALLS)
    trial = lab.create_trial("failing fsync or rename", name)
    failing = [call.split()[1] for call in trial.expected.calls if call.split()[1] in FAILING]
    at = moment.pick_number(len(failing))
    run = trial.start(
        Fault(FAILING, at, "fail", moment.pick(["EIO", "EROFS"])[0], onwards=moment.random.random() < 0.5)
    )
    trial.count(f"exit {run.wait()} at {failing[at - 1]}")
    assert run.code in (0, NOT_WRITTEN) or (run.code == CANNOT_CREATE and run.list_steps() == []), run.read_stderr()
    trial.check_recovery(run)
