"""A checkpoint is read as it was saved, or it is rejected."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from linfusion_cli.checkpoint import store as store_module
from linfusion_cli.checkpoint.store import CheckpointStore, DamagedCheckpoint, IncompatibleCheckpoint
from linfusion_cli.checkpoint.versions import NUMERICS, SCHEMA
from linfusion_cli.core.errors import CannotCreateOutput, TemporaryFailure, WriteFailed

STATE = {"latents": torch.arange(12.0).reshape(1, 3, 2, 2), "steps": 3, "more": {"outputs": [None, torch.ones(2)]}}


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "a.png").lock() as store:
        yield store


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
    store.save({"seed": 7}, {"phase_state": {"phase": 1}, "run_state": STATE})
    checkpoint = CheckpointStore(store.target).read()
    assert checkpoint.metadata == {"seed": 7} and checkpoint.state["phase_state"] == {"phase": 1}
    assert equal(checkpoint.state["run_state"], STATE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool])
def test_tensors_keep_their_type(store, dtype):
    store.save({}, {"run_state": {"x": torch.arange(5).to(dtype), "one": torch.tensor(1).to(dtype)}})
    assert equal(store.read().state["run_state"], {"x": torch.arange(5).to(dtype), "one": torch.tensor(1).to(dtype)})


def test_an_unchanged_section_is_written_once(store):
    steady = {"encoded": torch.ones(100)}
    store.save({}, {"phase_state": steady, "run_state": {"x": torch.zeros(10)}})
    before = store.saved_bytes
    store.save({}, {"phase_state": steady, "run_state": {"x": torch.ones(10)}})
    assert store.saved_bytes - before < 400
    assert len(list(store.folder.glob("*.safetensors"))) == 2
    assert equal(store.read().state, {"phase_state": steady, "run_state": {"x": torch.ones(10)}})


def test_remove_deletes_the_checkpoint_and_lock_deletes_the_empty_folder(store, tmp_path):
    store.save({}, {"run_state": STATE})
    store.remove()
    assert store.read() is None
    with CheckpointStore(tmp_path / "b.png").lock() as other:
        other.save({}, {"run_state": STATE})
        other.remove()
    assert not other.folder.exists()


def test_files_of_other_programs_stay(tmp_path):
    with CheckpointStore(tmp_path / "a.png").lock() as store:
        (store.folder / "notes.txt").write_text("mine")
        store.save({}, {"run_state": STATE})
        store.remove()
    assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_a_save_that_fails_leaves_the_state_before(store, monkeypatch, failing):
    store.save({}, {"run_state": {"x": torch.zeros(3)}})
    again = CheckpointStore(store.target)  # like the next run, which has not saved anything yet

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
            again.save({}, {"run_state": {"x": torch.ones(3)}})
    assert equal(again.read().state["run_state"], {"x": torch.zeros(3)})
    assert len(list(store.folder.iterdir())) == 3  # the lock, the manifest, and one file of tensors
    again.save({}, {"run_state": {"x": torch.ones(3)}})
    assert equal(again.read().state["run_state"], {"x": torch.ones(3)})


def test_a_folder_that_does_not_sync_after_the_rename_has_the_new_state(store, monkeypatch):
    store.save({}, {"run_state": {"x": torch.zeros(3)}})
    with monkeypatch.context() as patch:
        patch.setattr(
            "linfusion_cli.checkpoint.store.sync_folder", lambda folder: (_ for _ in ()).throw(OSError(5, "I/O error"))
        )
        with pytest.raises(WriteFailed):
            store.save({}, {"run_state": {"x": torch.ones(3)}})
    assert equal(store.read().state["run_state"], {"x": torch.ones(3)})


def test_no_flipped_bit_and_no_cut_passes(store):
    """The saved content is read, or the damage is detected: a bit in JSON whitespace, for example, changes nothing."""
    store.save({"seed": 7, "prompt": "ein Hügel"}, {"run_state": STATE})
    numbers = random.Random(0)
    detected = 0
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
                checkpoint = CheckpointStore(store.target).read()
                assert checkpoint.metadata == {"seed": 7, "prompt": "ein Hügel"}
                assert equal(checkpoint.state["run_state"], STATE)
            except DamagedCheckpoint:
                detected += 1
        path.write_bytes(whole)
    assert detected > 500 and equal(store.read().state["run_state"], STATE)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"sha256": 1}', "[" * 100_000, "\udcff", '{"entry": {}}'])
def test_invalid_manifests_are_damage(store, text):
    (store.folder / "checkpoint.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamagedCheckpoint):
        store.read()


def test_quarantine_keeps_all_files_and_numbers_the_folders(store):
    for number in (1, 2):
        store.save({}, {"run_state": STATE})
        folder = store.quarantine()
        assert folder.name == f"a.png.linfusion.aside-{number}" and (folder / "checkpoint.json").exists()
        assert store.read() is None


def write_schema_1(folder):
    """Write a checkpoint as the versions with schema 1 did, and the temporary manifest of a save that was killed."""
    from safetensors.torch import save

    tensors = save({"latents": torch.zeros(1, 4, 2, 2)})
    record = {"file": "1.safetensors", "sha256": hashlib.sha256(tensors).hexdigest()}
    parts = {"begun": record | {"values": {"phase": 0}}, "reached": record | {"values": {"steps": 1}}}
    entry = {"head": {"schema": 1, "linfusion": "0.0.9", "request": {}}, "parts": parts}
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / "1.safetensors").write_bytes(tensors)
    (folder / "journal.json").write_text(json.dumps({"sha256": digest, "entry": entry}))
    (folder / "journal.json.part").write_text("{")


def list_contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def test_a_checkpoint_of_schema_1_is_rejected_and_kept_until_it_is_removed(tmp_path):
    store = CheckpointStore(tmp_path / "a.png")
    write_schema_1(store.folder)
    before = list_contents(store.folder)
    with (
        pytest.raises(IncompatibleCheckpoint, match=r"a\.png\.linfusion .*schema 1;.*schema 3.*--fresh") as caught,
        store.lock(),
    ):
        assert store.exists()
        store.prune()
        store.read()
    assert caught.value.exit_code == 2 and list_contents(store.folder) == before
    with store.lock():
        store.remove()
        assert store.read() is None
    assert not store.folder.exists()


def test_a_checkpoint_of_schema_1_is_rejected_next_to_a_newer_manifest(store):
    """An older version ran after this one and did not know its manifest."""
    store.save({}, {"run_state": STATE})
    write_schema_1(store.folder)
    before = list_contents(store.folder)
    store.prune()
    with pytest.raises(IncompatibleCheckpoint, match="schema 1;"):
        store.read()
    assert list_contents(store.folder) == before


def test_a_checkpoint_of_another_version_with_equal_numbers_is_read(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "__version__", "0.0.9")
        store.save({"seed": 7}, {"run_state": STATE})
    checkpoint = CheckpointStore(store.target).read()
    assert checkpoint.linfusion == "0.0.9" and checkpoint.metadata == {"seed": 7}
    assert equal(checkpoint.state["run_state"], STATE)


@pytest.mark.parametrize(
    ("numbers", "details"),
    [
        ({"SCHEMA": SCHEMA + 1}, f"newer format .schema {SCHEMA + 1}; this version reads schema {SCHEMA}"),
        ({"NUMERICS": NUMERICS + 1}, f"linfusion 0.*other values .numerics {NUMERICS + 1}; .* numerics {NUMERICS}"),
        ({"SCHEMA": SCHEMA + 1, "NUMERICS": NUMERICS + 1}, "newer format"),
    ],
)
def test_a_checkpoint_of_another_schema_or_other_numerics_is_rejected_and_kept(store, monkeypatch, numbers, details):
    with monkeypatch.context() as patch:
        for name, value in numbers.items():
            patch.setattr(store_module, name, value)
        store.save({}, {"run_state": STATE})
    before = list_contents(store.folder)
    with pytest.raises(IncompatibleCheckpoint, match=f"{details}.*--fresh") as caught:
        store.read()
    assert caught.value.exit_code == 2
    if "SCHEMA" in numbers:
        (store.folder / "9.safetensors").write_bytes(b"named elsewhere by another schema")
        before = list_contents(store.folder)
        store.prune()
    assert list_contents(store.folder) == before


@pytest.mark.parametrize(("name", "value"), [("schema", SCHEMA), ("numerics", NUMERICS)])
def test_damage_is_not_taken_for_another_version(store, name, value):
    """The checksum is checked first: a flipped bit in a number does not make it another schema."""
    store.save({}, {"run_state": STATE})
    manifest = store.folder / "checkpoint.json"
    text = manifest.read_text()
    manifest.write_text(text.replace(f'"{name}": {value}', f'"{name}": {value + 1}'))
    assert manifest.read_text() != text
    with pytest.raises(DamagedCheckpoint):
        store.read()


def test_a_file_with_the_name_of_the_folder_is_rejected(tmp_path):
    (tmp_path / "a.png.linfusion").write_text("precious")
    with (
        pytest.raises(CannotCreateOutput, match="a.png.linfusion is not a folder"),
        CheckpointStore(tmp_path / "a.png").lock(),
    ):
        pass
    with pytest.raises(CannotCreateOutput, match="does not exist"), CheckpointStore(tmp_path / "no" / "a.png").lock():
        pass


def test_long_names(tmp_path):
    with CheckpointStore(tmp_path / ("ü" * 120 + ".png")).lock() as store:
        store.save({}, {"run_state": STATE})
        assert equal(store.read().state["run_state"], STATE)


HOLDER = """
import sys, time
from pathlib import Path
from linfusion_cli.checkpoint.store import CheckpointStore
with CheckpointStore(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_one_run_at_a_time_and_none_after_a_kill(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a.png")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(TemporaryFailure), CheckpointStore(tmp_path / "a.png").lock():
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with CheckpointStore(tmp_path / "a.png").lock():
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_vanishes_between_making_and_locking(tmp_path, monkeypatch):
    """The run that held the lock ends and removes its folder in between."""
    open_locked, calls = store_module.open_locked, []

    def remove_folder_first(path, target):
        calls.append(path)
        if len(calls) == 1:
            path.parent.rmdir()
        return open_locked(path, target)

    monkeypatch.setattr(store_module, "open_locked", remove_folder_first)
    with CheckpointStore(tmp_path / "a.png").lock():
        assert len(calls) == 2 and (tmp_path / "a.png.linfusion" / "lock").exists()


KILLED = """
import os, sys
from pathlib import Path
import torch
from linfusion_cli.checkpoint.store import CheckpointStore
with CheckpointStore(Path(sys.argv[1])).lock() as store:
    print("ready", flush=True)
    for number in range(10_000):
        store.save({"n": number}, {"run_state": {"x": torch.full((2000,), float(number))}})
"""


def test_killed_in_the_middle_of_saving_the_last_good_state_is_there(tmp_path):
    """Kill it repeatedly: metadata and tensors that are read belong to the same save."""
    numbers, seen = random.Random(1), []
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.png")]
    for _ in range(6):
        run = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
        assert run.stdout.readline() == "ready\n"
        time.sleep(numbers.uniform(0.05, 0.4))
        run.send_signal(signal.SIGKILL)
        run.wait()
        checkpoint = CheckpointStore(tmp_path / "a.png").read()
        if checkpoint is not None:
            number = float(checkpoint.metadata["n"])
            assert torch.equal(checkpoint.state["run_state"]["x"], torch.full((2000,), number))
            seen.append(number)
    assert seen and json.loads((tmp_path / "a.png.linfusion" / "checkpoint.json").read_text())
