"""Stop signals: the run saves its state and exits with 128 + N; the same command resumes it."""

import signal
import time

import pytest

from tests.faults.harness.calls import Fault
from tests.faults.harness.moments import Moment, run_in_parallel
from tests.faults.harness.runs import Run
from tests.faults.harness.trials import Lab, Trial

SOON_SEC = 5.0
ECHO_SEC = 0.7  # two signals within this time are one request
AT_ONCE_SEC = 1.0  # less than the rest of the grace period after the first signal
RETRY_FACTOR = 0.98  # of the share, if a run has ended before it could be stopped
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@run_in_parallel
@pytest.mark.moments(short=5, long=250)
def test_a_signal(lab: Lab, names: list[str], moment: Moment):
    """One of the requests saves its state so rarely that only the signal saves it."""
    number, moment = moment.pick(STOPS)
    name, moment = moment.pick(["seldom", *names])
    trial, run = start_and_stop(lab, name, number, moment.share)
    assert run.code == 128 + number, run.read_stderr()
    assert "Traceback" not in run.read_stderr()
    trial.check_resume(run, saved=True)


def start_and_stop(lab: Lab, name: str, number: int, share: float) -> tuple[Trial, Run]:
    """Start a run and send it a signal after a share of its duration; retry if it ended before."""
    while True:
        trial = lab.create_trial(signal.Signals(number).name, name)
        run = trial.start()
        if trial.wait_for_share(run, share):
            run.send(number)
            run.wait(SOON_SEC)
            if run.code != 0:
                return trial, run
        run.wait()
        trial.check_complete()
        share *= RETRY_FACTOR


def test_one_signal_ends_a_slow_step(lab: Lab):
    trial, run = start_slow_run(lab)
    run.send(signal.SIGTERM)
    assert run.wait(SOON_SEC) == 143, run.read_stderr()
    trial.rerun_to_completion()


def test_a_second_signal_ends_the_run_immediately(lab: Lab):
    trial, run = start_slow_run(lab)
    run.send(signal.SIGTERM)
    assert not run.has_ended(ECHO_SEC)
    run.send(signal.SIGTERM)
    deadline = time.monotonic() + AT_ONCE_SEC
    while "end" not in run.read_events():
        assert time.monotonic() < deadline, run.read_stderr()
        time.sleep(0.01)
    assert run.wait(SOON_SEC) == 143, run.read_stderr()
    assert trial.has_checkpoint
    trial.rerun_to_completion()


def test_nohup(lab: Lab):
    trial = lab.create_trial("nohup", "png")
    run = trial.start(ignored=signal.SIGHUP)
    assert trial.wait_for_share(run, 0.5)
    run.send(signal.SIGHUP)
    assert run.wait() == 0, run.read_stderr()
    trial.check_complete()


def start_slow_run(lab: Lab) -> tuple[Trial, Run]:
    """Start a run on a disk that blocks while a step is saved."""
    trial = lab.create_trial("slow disk", "png")
    syncs = [call for call in trial.expected.calls if call.split()[1] == "fsync"]
    at = len(syncs) // 2
    run, deadline = trial.start(Fault(calls=("fsync",), at=at, effect="wait")), time.monotonic() + 60
    while len(run.read_calls()) < at:
        assert not run.has_ended(0.02) and time.monotonic() < deadline
    return trial, run
