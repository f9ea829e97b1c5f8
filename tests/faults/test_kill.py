"""SIGKILL at any moment: the same command completes with identical files, and no output is ever partial."""

import pytest

from tests.faults.harness.calls import Fault
from tests.faults.harness.moments import Moment, run_in_parallel
from tests.faults.harness.requests import ALL_CALLS
from tests.faults.harness.runs import Run
from tests.faults.harness.trials import Lab, Trial

IMPORTS_SEC = 8.0
RETRY_FACTOR = 0.98  # of the share, if a run has ended before it could be killed
KILL_AGAIN_PROBABILITY = 0.35  # of killing a resumed run, too


@run_in_parallel
@pytest.mark.moments(short=6, long=200)
def test_killed_at_a_random_moment(lab: Lab, names: list[str], moment: Moment):
    name, moment = moment.pick(names)
    trial, run = start_and_kill(lab, name, moment.share)
    random = moment.random
    while trial.has_checkpoint and random.random() < KILL_AGAIN_PROBABILITY:
        run = trial.start()
        trial.wait_for_share(run, random.random())
        run.kill()
    trial.check_resume(run, trial.request.saves_each_step)


@run_in_parallel
@pytest.mark.moments(short=2, long=380)
def test_killed_at_a_call_that_changes_files(lab: Lab, moment: Moment):
    """Kill before the call, or after half of its data is written; the long version covers every call."""
    name, moment = moment.pick(ALL_CALLS)
    trial = lab.create_trial("killed at a call", name)
    at = moment.pick_number(len(trial.expected.calls))
    run = trial.start(Fault(at=at, effect=moment.random.choice(["kill", "tear"])))
    assert run.wait() == 137, run.read_stderr()
    assert len(run.read_calls()) == at
    trial.check_resume(run, trial.request.saves_each_step)


@run_in_parallel
@pytest.mark.moments(short=1, long=10)
def test_killed_during_imports(lab: Lab, moment: Moment):
    trial = lab.create_trial("killed, started without fork", "png")
    run = trial.start_without_fork()
    run.has_ended(moment.share * IMPORTS_SEC)
    trial.count("killed" if run.kill() else "complete")
    trial.rerun_to_completion()


def start_and_kill(lab: Lab, name: str, share: float) -> tuple[Trial, Run]:
    """Start a run and kill it after a share of its duration; retry if it ended before."""
    while True:
        trial = lab.create_trial("killed", name)
        run = trial.start()
        trial.wait_for_share(run, share)
        if run.kill():
            return trial, run
        share *= RETRY_FACTOR
