"""A journal is whole, or it is not believed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from linfusion_cli.checkpoint.store import CheckpointStore, DamagedCheckpoint
from linfusion_cli.core.errors import CannotCreateOutput, TemporaryFailure, WriteFailed

STATE = {"latents": torch.arange(12.0).reshape(1, 3, 2, 2), "steps": 3, "more": {"outputs": [None, torch.ones(2)]}}


@pytest.fixture
def store(tmp_path):
    found = CheckpointStore(tmp_path / "a.png")
    with found.held():
        yield found


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_what_is_saved_is_read(store):
    assert store.read() is None
    store.save({"seed": 7}, {"begun": {"phase": 1}, "reached": STATE})
    entry = CheckpointStore(store.target).read()
    assert entry.head == {"seed": 7} and equal(entry.parts["reached"], STATE) and entry.parts["begun"] == {"phase": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool])
def test_tensors_keep_their_type(store, dtype):
    store.save({}, {"state": {"x": torch.arange(5).to(dtype), "one": torch.tensor(1).to(dtype)}})
    assert equal(store.read().parts["state"], {"x": torch.arange(5).to(dtype), "one": torch.tensor(1).to(dtype)})


def test_a_part_that_stays_is_written_once(store):
    steady = {"encoded": torch.ones(100)}
    store.save({}, {"begun": steady, "reached": {"x": torch.zeros(10)}})
    before = store.saved_bytes
    store.save({}, {"begun": steady, "reached": {"x": torch.ones(10)}})
    assert store.saved_bytes - before < 400
    assert len(list(store.folder.glob("*.safetensors"))) == 2
    assert equal(store.read().parts, {"begun": steady, "reached": {"x": torch.ones(10)}})


def test_it_disappears(store, tmp_path):
    store.save({}, {"state": STATE})
    store.remove()
    assert store.read() is None
    with CheckpointStore(tmp_path / "b.png").held() as other:
        other.save({}, {"state": STATE})
        other.remove()
    assert not other.folder.exists()


def test_what_others_put_there_stays(tmp_path):
    with CheckpointStore(tmp_path / "a.png").held() as store:
        (store.folder / "notes.txt").write_text("mine")
        store.save({}, {"state": STATE})
        store.remove()
    assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_a_save_that_fails_leaves_the_state_before(store, monkeypatch, failing):
    store.save({}, {"state": {"x": torch.zeros(3)}})
    again = CheckpointStore(store.target)  # as the next run, which has saved nothing itself yet

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        targets = {
            "write": "linfusion_cli.checkpoint.store._write_synced",
            "fsync": "os.fsync",
            "rename": "pathlib.Path.replace",
        }
        patch.setattr(targets[failing], fail)
        with pytest.raises(WriteFailed, match="No space left"):
            again.save({}, {"state": {"x": torch.ones(3)}})
    assert equal(again.read().parts["state"], {"x": torch.zeros(3)})
    assert len(list(store.folder.iterdir())) == 3  # the lock, the manifest, and one file of tensors
    again.save({}, {"state": {"x": torch.ones(3)}})
    assert equal(again.read().parts["state"], {"x": torch.ones(3)})


def test_a_folder_that_does_not_sync_after_the_rename_has_the_new_state(store, monkeypatch):
    store.save({}, {"state": {"x": torch.zeros(3)}})
    with monkeypatch.context() as patch:
        patch.setattr(
            "linfusion_cli.checkpoint.store.sync_folder", lambda folder: (_ for _ in ()).throw(OSError(5, "I/O error"))
        )
        with pytest.raises(WriteFailed):
            store.save({}, {"state": {"x": torch.ones(3)}})
    assert equal(store.read().parts["state"], {"x": torch.ones(3)})


def refuse(folder):
    raise OSError(5, "Input/output error")


def test_no_flipped_bit_and_no_cut_passes(store):
    """What is read is what was saved, or nothing is: a bit that changes nothing, of a JSON's layout say, may pass."""
    store.save({"seed": 7, "prompt": "ein Hügel"}, {"state": STATE})
    numbers = random.Random(0)
    noticed = 0
    for path in [path for path in store.folder.iterdir() if path.name != "lock"]:
        whole = path.read_bytes()
        for at in [*(numbers.randrange(8 * len(whole)) for _ in range(200)), *range(-60, 0)]:
            if at < 0:
                damaged = whole[: len(whole) * (at + 60) // 60]
            else:
                damaged = bytearray(whole)
                damaged[at // 8] ^= 1 << at % 8
            path.write_bytes(damaged)
            try:
                entry = CheckpointStore(store.target).read()
                assert entry.head == {"seed": 7, "prompt": "ein Hügel"} and equal(entry.parts["state"], STATE)
            except DamagedCheckpoint:
                noticed += 1
        path.write_bytes(whole)
    assert noticed > 500 and equal(store.read().parts["state"], STATE)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"sha256": 1}', "[" * 100_000, "\udcff", '{"entry": {}}'])
def test_json_that_is_no_journal(store, text):
    (store.folder / "journal.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamagedCheckpoint):
        store.read()


def test_set_aside_keeps_all_and_counts(store):
    for number in (1, 2):
        store.save({}, {"state": STATE})
        aside = store.quarantine()
        assert aside.name == f"a.png.linfusion.aside-{number}" and (aside / "journal.json").exists()
        assert store.read() is None


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "a.png.linfusion").write_text("precious")
    with pytest.raises(CannotCreateOutput, match="is no folder"), CheckpointStore(tmp_path / "a.png").held():
        pass
    with pytest.raises(CannotCreateOutput, match="does not exist"), CheckpointStore(tmp_path / "no" / "a.png").held():
        pass


def test_long_names(tmp_path):
    with CheckpointStore(tmp_path / ("ü" * 120 + ".png")).held() as store:
        store.save({}, {"state": STATE})
        assert equal(store.read().parts["state"], STATE)


HOLDER = """
import sys, time
from pathlib import Path
from linfusion_cli.journal import Journal
with Journal(Path(sys.argv[1])).held():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_run_at_a_time_and_none_after_a_kill(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a.png")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(TemporaryFailure), CheckpointStore(tmp_path / "a.png").held():
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with CheckpointStore(tmp_path / "a.png").held():
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_vanishes_between_making_and_locking(tmp_path, monkeypatch):
    """The holder ends in that very moment, and takes its folder away."""
    from linfusion_cli.checkpoint import store as module

    lock, calls = module.open_locked, []

    def slow(path, target):
        calls.append(path)
        if len(calls) == 1:
            path.parent.rmdir()
        return lock(path, target)

    monkeypatch.setattr(module, "open_locked", slow)
    with CheckpointStore(tmp_path / "a.png").held():
        assert len(calls) == 2 and (tmp_path / "a.png.linfusion" / "lock").exists()


KILLED = """
import os, sys
from pathlib import Path
import torch
from linfusion_cli.journal import Journal
with Journal(Path(sys.argv[1])).held() as journal:
    print("ready", flush=True)
    for number in range(10_000):
        journal.save({"n": number}, {"state": {"x": torch.full((2000,), float(number))}})
"""


def test_killed_in_the_middle_of_saving_the_last_good_state_is_there(tmp_path):
    """Over and over: what is read is a whole state, never one of two mixed, and later than none."""
    numbers, seen = random.Random(1), []
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.png")]
    for _ in range(6):
        run = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
        assert run.stdout.readline() == "ready\n"
        time.sleep(numbers.uniform(0.05, 0.4))
        run.send_signal(signal.SIGKILL)
        run.wait()
        entry = CheckpointStore(tmp_path / "a.png").read()
        if entry is not None:
            assert torch.equal(entry.parts["state"]["x"], torch.full((2000,), float(entry.head["n"])))
            seen.append(entry.head["n"])
    assert seen and json.loads((tmp_path / "a.png.linfusion" / "journal.json").read_text())
