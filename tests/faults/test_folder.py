"""A folder that becomes unwritable while a run is under way; the run is another user's, whom modes concern."""

import pytest

from tests.faults.moments import Moment
from tests.faults.trials import Lab, Trial

CANNOT_CREATE, NOT_WRITTEN = 73, 74


@pytest.mark.moments(short=2, long=50)
def test_a_folder_that_becomes_unwritable(lab: Lab, names: list[str], moment: Moment):
    """The folder, or only its journal, or both."""
    trial = lab.trial("unwritable folder", moment.one_of(names), as_nobody=True)
    run = trial.start()
    run.ended(moment.share * trial.expected.seconds)
    closed = [folder for folder in (trial.folder, trial.journal) if folder.exists()]
    for folder in closed[moment.index % 3 == 1 :][: 1 + moment.index % 3 // 2]:
        folder.chmod(0o555)
    run.wait()
    for folder in closed:
        if folder.exists():
            folder.chmod(0o755)
    trial.count(f"exit {run.code} in {run.place()}")
    assert run.code in (0, CANNOT_CREATE, NOT_WRITTEN), run.stderr()
    goes_well_again(trial, run.code)


def test_a_folder_that_is_unwritable(lab: Lab):
    trial = lab.trial("unwritable folder", "png", as_nobody=True)
    trial.folder.chmod(0o555)
    run = trial.start()
    assert run.wait() == CANNOT_CREATE and "refuses a new file: Permission denied" in run.stderr()
    trial.folder.chmod(0o755)
    trial.completes()


def goes_well_again(trial: Trial, code: int) -> None:
    trial.check_names()
    if code == 0 and trial.left_over() == []:
        trial.check_complete()
    else:
        trial.completes()
