"""A failing fsync or rename, at each one that a run makes: once, or from then on."""

import pytest

from tests.faults.calls import SYNCS, Fault
from tests.faults.moments import Moment
from tests.faults.trials import Lab

NOT_WRITTEN = 74
FAILING = (*SYNCS, "rename", "replace", "link")


@pytest.mark.moments(short=3, long=160)
def test_a_failing_sync_or_rename(lab: Lab, names: list[str], moment: Moment):
    trial = lab.trial("failing fsync or rename", moment.one_of(names))
    turn = Moment(moment.index // len(names), -(-moment.count // len(names)))
    failing = [call.split()[1] for call in trial.expected.calls if call.split()[1] in FAILING]
    at = turn.number(len(failing))
    run = trial.start(Fault(FAILING, at, "fail", moment.one_of(["EIO", "EIO", "EROFS"]), onwards=turn.index % 2 == 1))
    trial.count(f"exit {run.wait()} at {failing[at - 1]}")
    assert run.code in (0, NOT_WRITTEN), run.stderr()
    assert "Traceback" not in run.stderr()
    trial.check_names()
    if run.code == 0 and trial.left_over() == []:
        trial.check_complete()
    else:
        trial.completes()
