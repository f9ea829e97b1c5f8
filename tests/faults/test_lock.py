"""Many runs at once on the same output: one works, and the others say so at once."""

import pytest

from tests.faults.harness.runs import TRY_AGAIN
from tests.faults.harness.trials import Lab

RUNS = 20


@pytest.mark.moments(short=1, long=5)
def test_twenty_at_once(lab: Lab, moment):
    trial = lab.trial("twenty at once", "png")
    runs = [trial.start() for _ in range(RUNS)]
    codes = sorted(run.wait() for run in runs)
    assert codes == [0] + [TRY_AGAIN] * (RUNS - 1), [run.stderr() for run in runs if run.code not in (0, TRY_AGAIN)]
    refused = [run for run in runs if run.code]
    assert all("Another run is writing" in run.stderr() for run in refused)
    assert all(run.steps() == [] for run in refused)
    trial.check_complete()
