"""Many runs with the same output at once: one runs, the others exit immediately."""

import pytest

from tests.faults.harness.runs import TRY_AGAIN
from tests.faults.harness.trials import Lab

RUNS = 20


@pytest.mark.moments(short=1, long=5)
def test_twenty_at_once(lab: Lab, moment):
    trial = lab.create_trial("twenty at once", "png")
    runs = [trial.start() for _ in range(RUNS)]
    codes = sorted(run.wait() for run in runs)
    assert codes == [0] + [TRY_AGAIN] * (RUNS - 1), [
        run.read_stderr() for run in runs if run.code not in (0, TRY_AGAIN)
    ]
    rejected = [run for run in runs if run.code]
    assert all("Another run is writing" in run.read_stderr() for run in rejected)
    assert all(run.list_steps() == [] for run in rejected)
    trial.check_complete()
