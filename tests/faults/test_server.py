"""What all other tests here rely on: a forked run is what a truly started one is."""

from tests.faults.harness.trials import Lab


def test_a_forked_run_makes_the_same_files(lab: Lab):
    trial = lab.trial("truly started", "png")
    assert trial.start_truly().wait() == 0
    trial.check_complete()


def test_runs_make_the_same_calls(lab: Lab):
    """So that the n-th call of one is the n-th of all."""
    trial = lab.trial("undisturbed", "png")
    run = trial.start()
    assert run.wait() == 0
    assert run.calls() == trial.expected.calls
