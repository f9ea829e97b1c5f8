"""A folder becomes read-only during a run. The run is not by root, to whom file modes do not apply."""

from pathlib import Path

import pytest

from tests.faults.harness.moments import Moment, run_in_parallel
from tests.faults.harness.runs import CANNOT_CREATE, NOT_WRITTEN
from tests.faults.harness.trials import Lab


@run_in_parallel
@pytest.mark.moments(short=1, long=50)
def test_a_folder_that_becomes_unwritable(lab: Lab, names: list[str], moment: Moment):
    """The output folder, its checkpoint folder, or both become read-only."""
    name, moment = moment.pick(names)
    trial = lab.create_trial("unwritable folder", name, as_nobody=True)
    folders, moment = moment.pick([(trial.folder,), (trial.store,), (trial.folder, trial.store)])
    run = trial.start()
    trial.wait_for_share(run, moment.share)
    closed = [folder for folder in folders if folder.exists()]
    for folder in closed:
        folder.chmod(0o555)
    run.wait()
    for folder in filter(Path.exists, closed):
        folder.chmod(0o755)
    trial.count(f"exit {run.code} in {run.find_last_stage()}")
    assert run.code in (0, CANNOT_CREATE, NOT_WRITTEN), run.read_stderr()
    trial.check_recovery(run)


def test_a_folder_that_is_unwritable(lab: Lab):
    trial = lab.create_trial("unwritable folder", "png", as_nobody=True)
    trial.folder.chmod(0o555)
    run = trial.start()
    assert run.wait() == CANNOT_CREATE and ": Permission denied" in run.read_stderr()
    trial.folder.chmod(0o755)
    trial.rerun_to_completion()
