"""The premise of all fault tests: a forked run does the same as one started by a shell."""

from tests.faults.harness.trials import Lab


def test_a_forked_run_makes_the_same_files(lab: Lab):
    trial = lab.create_trial("started without fork", "png")
    assert trial.start_without_fork().wait() == 0
    trial.check_complete()


def test_runs_make_the_same_calls(lab: Lab):
    """Faults are addressed by the number of a call."""
    trial = lab.create_trial("reference", "png")
    run = trial.start()
    assert run.wait() == 0
    assert run.read_calls() == trial.expected.calls
