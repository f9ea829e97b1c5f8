"""A folder that becomes unwritable while a run is under way; the run is another user's, whom modes concern."""

from pathlib import Path

import pytest

from tests.faults.harness.moments import Moment, side_by_side
from tests.faults.harness.runs import CANNOT_CREATE, NOT_WRITTEN
from tests.faults.harness.trials import Lab


@side_by_side
@pytest.mark.moments(short=1, long=50)
def test_a_folder_that_becomes_unwritable(lab: Lab, names: list[str], moment: Moment):
    """The folder, or only its journal, or both."""
    name, moment = moment.dealt(names)
    trial = lab.trial("unwritable folder", name, as_nobody=True)
    which, moment = moment.dealt([(trial.folder,), (trial.store,), (trial.folder, trial.store)])
    run = trial.start()
    trial.reaches(run, moment.share)
    closed = [folder for folder in which if folder.exists()]
    for folder in closed:
        folder.chmod(0o555)
    run.wait()
    for folder in filter(Path.exists, closed):
        folder.chmod(0o755)
    trial.count(f"exit {run.code} in {run.place()}")
    assert run.code in (0, CANNOT_CREATE, NOT_WRITTEN), run.stderr()
    trial.recovers(run)


def test_a_folder_that_is_unwritable(lab: Lab):
    trial = lab.trial("unwritable folder", "png", as_nobody=True)
    trial.folder.chmod(0o555)
    run = trial.start()
    assert run.wait() == CANNOT_CREATE and "refuses a new file: Permission denied" in run.stderr()
    trial.folder.chmod(0o755)
    trial.completes()
