"""A device that fails during a run: the last save stays and is reported, and the same command resumes it."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from linfusion_cli.checkpoint.store import CheckpointStore
from linfusion_cli.run.checkpoint import manager
from linfusion_cli.run.checkpoint.state import RunState
from linfusion_cli.sampling.schedulers.schedule import Schedule

MORE = "\nSearch for `cudaErrorX' in https://docs.nvidia.com for more.\nCUDA kernel errors might be reported elsewhere."
LOST = "CUDA error: unspecified launch failure"
BUG = "CUDA error: an illegal memory access was encountered"
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB"
STEPS = 4  # of the base; the phase above has 3


class Card:
    """Let a step fail, optionally with latents on the device that cannot be read afterwards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.error: BaseException | None = None
        self.fails_at, self.is_readable, self.steps = 0, True, 0
        self._stepped, self._is_finite = Schedule.step, RunState.is_finite.fget
        monkeypatch.setattr(Schedule, "step", lambda *arguments: self._step(*arguments))
        monkeypatch.setattr(RunState, "is_finite", property(self._finite))

    def fail(self, error: BaseException | None, at: int = 0, is_readable: bool = True) -> None:
        """Let step `at` of the next run fail, counted from 1 over all phases."""
        self.error, self.fails_at, self.is_readable, self.steps = error, at, is_readable, 0

    def _step(self, *arguments):
        self.steps += 1
        if self.steps == self.fails_at and self.error is not None:
            raise self.error
        return self._stepped(*arguments)

    def _finite(self, state: RunState) -> bool:
        is_on_device = not state.is_done and state.latents is not None
        if is_on_device and not self.is_readable and self.steps >= self.fails_at:
            raise torch.AcceleratorError(f"{LOST}{MORE}")
        return self._is_finite(state)


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


@pytest.fixture
def make(cli, xl_model, tmp_path):
    """Return a function that runs generate with two phases -> exit code and stderr."""

    def run(*options: object) -> tuple[int, str]:
        arguments = ["generate", "a hill", "--model", xl_model, "--size", 128, "--steps", STEPS, "--strength", 0.7]
        code, out, err = cli(*arguments, "-o", "a.png", *options)
        assert out == ("a.png\n" if code == 0 else "")
        return code, err

    return run


@pytest.fixture
def expected(make, tmp_path):
    """The pixels of a run without failures."""
    assert make()[0] == 0
    pixels = pixels_in(tmp_path)
    (tmp_path / "a.png").unlink()
    return pixels


def pixels_in(folder: Path) -> bytes:
    with Image.open(folder / "a.png") as image:
        return image.tobytes()


def last_line(err: str) -> str:
    return err.splitlines()[-1]


EVERY_STEP, RARELY = ("--checkpoint-every", 0), ("--checkpoint-every", 3600)


@pytest.mark.parametrize(
    ("options", "at", "saved"),
    [
        (EVERY_STEP, 3, "Saved: step 2 of 4 in phase base; the same command resumes it."),
        (EVERY_STEP, 6, "Saved: step 1 of 3 in phase 2x; the same command resumes it."),
        (RARELY, 6, "Saved: step 0 of 3 in phase 2x; the same command resumes it."),
        (RARELY, 3, "No progress was saved."),
    ],
)
def test_a_lost_device_is_69_and_the_same_command_resumes(card, make, expected, tmp_path, options, at, saved):
    card.fail(torch.AcceleratorError(f"{LOST}{MORE}"), at, is_readable=False)
    code, err = make(*options)
    assert code == 69 and f"The GPU was lost: {LOST}." in last_line(err) and last_line(err).endswith(saved)
    assert "could not be read" not in err and "Traceback" not in err and not (tmp_path / "a.png").exists()
    card.fail(None)
    assert make(*options)[0] == 0
    assert pixels_in(tmp_path) == expected


def test_the_save_of_an_earlier_run_is_reported(card, make):
    card.fail(torch.AcceleratorError(LOST), 3, is_readable=False)
    make(*EVERY_STEP)
    card.fail(torch.AcceleratorError(LOST), 1, is_readable=False)
    code, err = make(*EVERY_STEP)
    assert (
        code == 69
        and "state of an earlier run" in last_line(err)
        and last_line(err).endswith("the same command resumes it.")
    )


@pytest.mark.parametrize(("options", "steps"), [(EVERY_STEP, 1), (RARELY, 0)])
def test_a_possible_bug_is_70_and_does_not_change_the_state(card, make, expected, tmp_path, options, steps):
    """The message describes the bug, although the state on the device cannot be read."""
    card.fail(torch.AcceleratorError(f"{BUG}{MORE}"), 6, is_readable=False)
    code, err = make(*options)
    log = Path(re.search(r"Log: (\S+\.log)", err)[1])
    assert code == 70 and BUG in log.read_text() and LOST not in log.read_text() + err
    assert last_line(err).endswith(f"Saved: step {steps} of 3 in phase 2x; the same command resumes it.")
    log.unlink()
    card.fail(None)
    assert make(*options)[0] == 0
    assert pixels_in(tmp_path) == expected


def test_a_bug_before_the_first_save_reports_no_save(card, make):
    card.fail(ZeroDivisionError("oops"), 1, is_readable=True)
    code, err = make(*RARELY)
    log = Path(re.search(r"Log: (\S+\.log)$", err.strip())[1])
    assert code == 70 and "aved" not in last_line(err)
    log.unlink()


def test_a_bug_keeps_its_cause_for_the_log(card, make):
    error = ZeroDivisionError("oops")
    error.__cause__ = KeyError("the cause")
    card.fail(error, 6, is_readable=True)
    _, err = make(*EVERY_STEP)
    log = Path(re.search(r"Log: (\S+\.log)", err)[1])
    assert "KeyError: 'the cause'" in log.read_text()
    log.unlink()


@pytest.mark.parametrize("is_readable", [True, False])
def test_out_of_memory_saves_the_state_if_it_can_be_read(card, make, expected, tmp_path, is_readable):
    card.fail(torch.OutOfMemoryError(FULL), 7, is_readable)
    code, err = make(*RARELY)
    assert code == 71 and "(CUDA out of memory)." in last_line(err)
    if is_readable:
        assert last_line(err).endswith("Saved: step 2 of 3 in phase 2x; the same command resumes it.")
    else:
        assert f"The last state could not be read ({LOST}). Saved: step 0 of 3 in phase 2x;" in last_line(err)
    card.fail(None)
    assert make(*RARELY)[0] == 0
    assert pixels_in(tmp_path) == expected


def test_out_of_memory_frees_the_computation_before_it_reads_the_state(card, make, monkeypatch):
    """The traceback of the error holds references to it."""
    alive, freed = [], []

    class Big:
        def __init__(self):
            alive.append(self)

    def fail(*_):
        big = Big()
        alive.remove(big)
        import weakref

        freed.append(weakref.ref(big))
        raise torch.OutOfMemoryError(FULL)

    calls = []
    monkeypatch.setattr(Schedule, "step", fail)
    monkeypatch.setattr(manager, "release_memory", lambda device: calls.append((device, freed[0]())))
    assert make(*RARELY)[0] == 71 and [found for _, found in calls] == [None]


def test_a_signal_on_a_lost_device_is_reported_as_a_signal(card, make, monkeypatch):
    from linfusion_cli.core.errors import Stopped

    card.fail(Stopped(15), 7, is_readable=False)
    code, err = make(*RARELY)
    assert code == 143 and "Stopped by SIGTERM." in last_line(err)
    assert f"The last state could not be read ({LOST}). Saved: step 0 of 3 in phase 2x;" in last_line(err)


def test_an_unreadable_state_keeps_the_previous_save(card, make, expected, tmp_path):
    """This includes a failure that shows only when the state is read for saving."""
    real_save, saved = CheckpointStore.save, []

    def save(store, metadata, state):
        saved.append(state["run_state"]["steps"])
        if len(saved) == 3:
            raise torch.AcceleratorError(f"{LOST}{MORE}")
        real_save(store, metadata, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "save", save)
        code, err = make(*EVERY_STEP)
    assert code == 69 and "Saved: step 2 of 4 in phase base;" in last_line(err)
    assert make(*EVERY_STEP)[0] == 0
    assert pixels_in(tmp_path) == expected
