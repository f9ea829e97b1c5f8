"""A signal that stops: the run saves its state and ends with 128 + N; the same command goes on."""

import signal
import time

import pytest

from tests.faults.harness.calls import Fault
from tests.faults.harness.moments import Moment, side_by_side
from tests.faults.harness.runs import Run
from tests.faults.harness.trials import Lab, Trial

SOON_SEC = 5.0
ECHO_SEC = 0.7  # two signals closer together than this may be one wish
AT_ONCE_SEC = 1.0  # less than what is left of the grace that the first signal gives
SOONER = 0.98  # where a run that was to be stopped has ended before
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@side_by_side
@pytest.mark.moments(short=5, long=250)
def test_a_signal(lab: Lab, names: list[str], moment: Moment):
    """Also where the state is saved so seldom that only the signal saves it."""
    number, moment = moment.dealt(STOPS)
    name, moment = moment.dealt(["seldom", *names])
    trial, run = stopped(lab, name, number, moment.share)
    assert run.code == 128 + number, run.stderr()
    assert "Traceback" not in run.stderr()
    trial.goes_on(run, saved=True)


def stopped(lab: Lab, name: str, number: int, share: float) -> tuple[Trial, Run]:
    """A run that was sent a signal after a share of its life; one that was quicker than that is not counted."""
    while True:
        trial = lab.trial(signal.Signals(number).name, name)
        run = trial.start()
        if trial.reaches(run, share):
            run.send(number)
            run.wait(SOON_SEC)
            if run.code != 0:
                return trial, run
        run.wait()
        trial.check_complete()
        share *= SOONER


def test_one_signal_ends_a_step_that_takes_long(lab: Lab):
    trial, run = slow(lab)
    run.send(signal.SIGTERM)
    assert run.wait(SOON_SEC) == 143, run.stderr()
    trial.completes()


def test_a_second_signal_ends_it_at_once(lab: Lab):
    trial, run = slow(lab)
    run.send(signal.SIGTERM)
    assert not run.ended(ECHO_SEC)
    run.send(signal.SIGTERM)
    until = time.monotonic() + AT_ONCE_SEC
    while "end" not in run.events():
        assert time.monotonic() < until, run.stderr()
        time.sleep(0.01)
    assert run.wait(SOON_SEC) == 143, run.stderr()
    assert trial.has_journal
    trial.completes()


def test_nohup(lab: Lab):
    trial = lab.trial("nohup", "png")
    run = trial.start(ignored=signal.SIGHUP)
    assert trial.reaches(run, 0.5)
    run.send(signal.SIGHUP)
    assert run.wait() == 0, run.stderr()
    trial.check_complete()


def slow(lab: Lab) -> tuple[Trial, Run]:
    """A run in the middle of saving a step, on a disk that takes for ever."""
    trial = lab.trial("slow disk", "png")
    syncs = [call for call in trial.expected.calls if call.split()[1] == "fsync"]
    at = len(syncs) // 2
    run, until = trial.start(Fault(calls=("fsync",), at=at, effect="wait")), time.monotonic() + 60
    while len(run.calls()) < at:
        assert not run.ended(0.02) and time.monotonic() < until
    return trial, run
